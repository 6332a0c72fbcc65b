"""Explains a run's result: similarity and effective rank of its banks, the contribution of each to the answers, and
changed answers.

Everything goes into `analysis.json`, which the report shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.per_sample import whole_banks
from mslora_cr.banks.similarity import by_layer_and_module, effective_ranks, update_cosines
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.records import sample_of
from mslora_cr.data.tasks import test_records
from mslora_cr.distributed.comm import assert_same_on_all_ranks, barrier, rank
from mslora_cr.evaluation.answer_files import Origin, answer_once
from mslora_cr.evaluation.results import Cell, Evaluation, read_evaluation
from mslora_cr.evaluation.schemas import (
    ANALYSIS,
    ANSWERS,
    ROUTED,
    Analysis,
    Change,
    ChangedAnswer,
    Contribution,
    Dropped,
    EffectiveRank,
    PairedNote,
    UpdateCosines,
)
from mslora_cr.evaluation.score import group_numbers, question_groups, read_answers
from mslora_cr.evaluation.session import EvaluationSession
from mslora_cr.metrics.published import RowScore, score_answers
from mslora_cr.runs.environment import check_hosts
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.runs.lock import launch
from mslora_cr.statistics.intervals import Groups
from mslora_cr.statistics.matrix_intervals import is_binary
from mslora_cr.statistics.paired import paired_change, paired_task
from mslora_cr.stream.recorded import answering_method
from mslora_cr.utils.progress import progress_bar

QUESTIONS = 200
"""The number of questions of a task that drop-one evaluation asks by default, a sample of its file."""
EXAMPLES = 2
"""The number of examples of changed answers, of each kind and task."""


def analyze(config: StreamConfig, others: Sequence[StreamConfig] = (), questions: int = QUESTIONS) -> Path:
    """Analyse a trained run, and write `analysis.json` into its results folder; return its path.

    Args:
        others: Runs whose effective ranks are shown beside this one's, such as one without the orthogonality term.
        questions: The most questions of a task for drop-one evaluation; 0 leaves it out.

    Raises:
        BankError: A run has no banks.
        ModelError, DataError: Something cannot be read.
        LockedError: Another launch writes to the results folder.
    """
    with launch(config, config.results_run_dir):
        banks = _banks_of(config)
        check_hosts(config.results_run_dir, {"the banks": [bank.digest for bank in banks.values()]})
        runs = {run.run: run for run in (config, *others)}
        if len(runs) <= len(others):  # The names repeat.
            runs = {str(run.run_dir): run for run in (config, *others)}
        # Such a bank is active as a whole or not at all.
        summed = not any(bank.depends_on_input for bank in banks.values())
        analysis = Analysis(
            run=config.run,
            similarity=_similarity(list(banks.values())),
            effective_rank={label: _ranks(_banks_of(run)) for label, run in runs.items()},
            contribution=_contribution(config, banks, questions) if questions and summed else None,
            changed=_changed(config.results_run_dir),
        )
        path = config.results_run_dir / ANALYSIS
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            analysis.write(path)
        barrier()
        return path


def _banks_of(config: StreamConfig) -> dict[str, Bank]:
    banks = finished_banks(config)
    if not banks:
        raise BankError(f"no task of this run is trained yet in {config.run_dir}; train one first")
    return banks


# --- geometry --------------------------------------------------------------------------------------------------------


def _similarity(banks: Sequence[Bank]) -> UpdateCosines:
    """Return the cosines of the banks' updates, averaged by layer and by module; matrices in the order of `banks`."""
    names = progress_bar(banks[0].matrices, desc="similarity of banks", unit="layer", disable=rank() != 0)
    by_layer, by_module = by_layer_and_module({name: update_cosines(name, banks) for name in names})
    return UpdateCosines(
        banks=[bank.name for bank in banks],
        by_layer={layer: values.tolist() for layer, values in by_layer.items()},
        by_module={layer: values.tolist() for layer, values in by_module.items()},
    )


def _ranks(banks: Mapping[str, Bank]) -> dict[str, EffectiveRank]:
    """Return each bank's rank and its mean effective rank, in total, by decoder layer and by module."""
    effective = {}
    for name, bank in progress_bar(banks.items(), desc="effective ranks", unit="bank", disable=rank() != 0):
        ranks = {module: torch.tensor(value) for module, value in effective_ranks(bank).items()}
        by_layer, by_module = by_layer_and_module(ranks)
        effective[name] = EffectiveRank(
            rank=bank.rank,
            mean=float(torch.stack(list(ranks.values())).mean()),
            by_layer={layer: float(value) for layer, value in by_layer.items()},
            by_module={layer: float(value) for layer, value in by_module.items()},
        )
    return effective


# --- what each bank adds to the answers ------------------------------------------------------------------------------


Variant = tuple[Task, tuple[int, ...]]
"""A task, and the indices of the banks that answer it."""


def _contribution(config: StreamConfig, learned: Mapping[str, Bank], questions: int) -> Contribution:
    """Answer every learned task with its banks, and again with each of them left out.

    A question's score is its hit if it is closed, and its F1 if it is open.
    """
    variants = _variants(config, learned)
    records = {task.name: test_records(config, task) for task, _ in variants}
    subsets = {name: part.thinned(questions) for name, part in records.items()}
    session = EvaluationSession(config, list(learned.values()), subsets)
    fingerprint = session.fingerprint(
        session.banks,
        rows=[(task.name, banks) for task, banks in variants],
        questions=[(part.digest, sample_of(len(part), questions)) for part in records.values()],
    )
    assert_same_on_all_ranks({"the questions, banks or settings of the analysis": fingerprint})
    # All variants of all tasks share mixed batches, so that leaving out a bank needs no new model.
    chosen = [banks for task, banks in variants for _ in range(len(subsets[task.name]))]
    folder, tasks = config.results_run_dir / "analysis", [task for task, _ in variants]

    origin = Origin(fingerprint)

    def answer() -> dict[str, float]:
        weights = whole_banks(chosen, len(session.banks))
        return session.answer_mixed(tasks, weights, folder, origin, "each bank left out")

    answer_once(folder, origin, len(chosen), answer)
    scores = np.array([_score(row) for row in score_answers(read_answers(folder / ANSWERS)).rows])
    keys = {name: question_groups(part) for name, part in subsets.items()}
    groups = {name: group_numbers([group for _, group in part]) for name, part in keys.items()}
    parts = np.split(scores, np.cumsum([len(subsets[task.name]) for task, _ in variants])[:-1])
    return Contribution(
        banks_by=_banks_by(config),
        score="hit of closed questions, F1 of open ones",
        rows=_dropped(list(learned), variants, parts, groups),
    )


def _dropped(
    names: Sequence[str], variants: Sequence[Variant], parts: Sequence[Any], groups: Mapping[str, Groups]
) -> list[Dropped]:
    """Return the contribution of each bank to each task, from the scores of every variant; the first variant has all
    banks.
    """
    rows = []
    whole: dict[str, tuple[tuple[int, ...], Any]] = {}
    for (task, banks), part in zip(variants, parts, strict=True):
        if task.name not in whole:
            whole[task.name] = (banks, part)
            continue
        [dropped] = set(whole[task.name][0]) - set(banks)
        difference = whole[task.name][1] - part
        change = paired_change([paired_task(difference, groups[task.name], is_binary(np.abs(difference)))])
        rows.append(
            Dropped(
                task=task.name,
                dropped=names[dropped],
                questions=len(part),
                with_all=100 * float(whole[task.name][1].mean()),
                without=100 * float(part.mean()),
                contribution=100 * float(difference.mean()),
                interval=change.ends,
                changed=change.gained + change.lost,
                change=PairedNote.of(change),
            )
        )
    return rows


def _banks_by(config: StreamConfig) -> str:
    return "all" if config.evaluation.banks_by == "all" else "prefix"


def _variants(config: StreamConfig, by_task: Mapping[str, Bank]) -> list[Variant]:
    """Return each learned task with the indices in `by_task` of the banks that answer it, then without each bank."""
    method, names, variants = answering_method(config), list(by_task), []
    learned = [config.task(name).index + 1 for name in names]
    stage = max(method.stages(learned, len(config.tasks)))
    for task in config.stream[:stage]:
        numbers = method.banks(task.index + 1, stage, _banks_by(config))
        if not set(numbers) <= set(learned):
            continue
        banks = tuple(learned.index(number) for number in numbers)
        variants.append((task, banks))
        variants += [(task, tuple(bank for bank in banks if bank != dropped)) for dropped in banks]
    return variants


def _score(row: RowScore) -> float:
    return float(row.hit) if row.answer_type == "CLOSED" else row.overlap.f1


# --- answers that changed --------------------------------------------------------------------------------------------


def _changed(results_dir: Path) -> list[Change]:
    """Return answers to a task that differ between its own stage and the last one, or between task-aware and
    task-agnostic.
    """
    aware, agnostic = read_evaluation(results_dir), read_evaluation(results_dir / ROUTED)
    changes: list[Change] = []
    if aware is None:
        return changes
    for task in aware.tasks:
        learned, last = aware.own_cell(task), aware.last_cell(task)
        if learned and last and learned.stage != last.stage:
            changes.append(
                _change(task, "own stage", "last stage", (results_dir, aware, learned), (results_dir, aware, last))
            )
        guessed = agnostic.last_cell(task) if agnostic else None
        if agnostic and last and guessed and guessed.questions == last.questions:
            routed_folder = results_dir / ROUTED
            changes.append(
                _change(
                    task, "task-aware", "task-agnostic", (results_dir, aware, last), (routed_folder, agnostic, guessed)
                )
            )
    return changes


Side = tuple[Path, Evaluation, Cell]


def _change(task: str, first: str, second: str, before: Side, after: Side) -> Change:
    """Return how many answers changed, and how, with examples of each kind. One file for both cannot change."""
    sides = [folder / cell.answers for folder, _, cell in (before, after)]
    summary = Change.model_validate(
        {
            "task": task,
            "from": f"{first}, banks {before[1].bank_numbers(before[2])}",
            "to": f"{second}, banks {after[1].bank_numbers(after[2])}",
            "questions": before[2].rows,
            "same_banks": sides[0] == sides[1],
            "changed": 0,
            "lost": 0,
            "gained": 0,
            "examples": [],
        }
    )
    if summary.same_banks:
        return summary
    old, new = (read_answers(path) for path in sides)
    hits = [[row.hit for row in score_answers(answers).rows] for answers in (old, new)]
    kinds: dict[str, list[ChangedAnswer]] = {"lost": [], "gained": [], "changed": []}
    for one, two, was, now in zip(old, new, *hits, strict=True):
        if one.text == two.text:
            continue
        kind = "lost" if was and not now else "gained" if now and not was else "changed"
        kinds[kind].append(
            ChangedAnswer(kind=kind, question=one.prompt, before=str(one.text), after=str(two.text), truth=str(one.gt))
        )
    counts = {
        "changed": sum(len(examples) for examples in kinds.values()),
        "lost": len(kinds["lost"]),
        "gained": len(kinds["gained"]),
        "examples": [example for examples in kinds.values() for example in examples[:EXAMPLES]],
    }
    return summary.model_copy(update=counts)
