"""Answers and scores tasks at stages of a run: the diagonal as published, or the whole task × stage matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.clinical.calibrated import stored_temperature
from mslora_cr.clinical.training import task_frequencies
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.sources.leaks import tell
from mslora_cr.data.tasks import task_folder
from mslora_cr.distributed.comm import barrier, rank
from mslora_cr.evaluation.answer_files import Origin, answer_once
from mslora_cr.evaluation.asking import AS_IT_IS, Asking, asked_records, write_blank
from mslora_cr.evaluation.cells import PlannedCell, Stages, cells
from mslora_cr.evaluation.doubts import warn_of_doubts
from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import score_file
from mslora_cr.evaluation.session import EvaluationSession
from mslora_cr.evaluation.summary import ImageDigests, ResultsTarget, cell_row, question_digests, write_summary
from mslora_cr.metrics.published import Scores
from mslora_cr.runs.environment import check_hosts
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.runs.lock import launch


def evaluate(
    config: StreamConfig,
    stages: Stages = "own",
    only: str | None = None,
    banks: Mapping[str, Bank] | None = None,
    asking: Asking = AS_IT_IS,
) -> Path:
    """Answer and score every learned task, or only the one named; return the path of `evaluation.json`.

    Args:
        banks: The banks by task, if they do not come from the run folder's ledger.
        asking: How questions are put. Tasks that have no such questions are left out.

    Raises:
        ConfigError, DataError, ModelError, BankError, LockedError: Before anything is answered.
    """
    if config.evaluation.banks_by == "routed":
        raise ConfigError("evaluation.banks_by is routed; call evaluate_routed instead")
    target = asking.config(config)
    with launch(config, target.results_run_dir):
        by_task = dict(banks) if banks is not None else finished_banks(config)
        by_number = {task.index + 1: by_task[task.name] for task in config.stream if task.name in by_task}
        wanted = _wanted_cells(target, stages, only, list(by_number))
        return _answer_cells(target, [cell for cell in wanted if asking.is_there(config, cell.task)], by_number, asking)


def _wanted_cells(config: StreamConfig, stages: Stages, only: str | None, learned: Sequence[int]) -> list[PlannedCell]:
    """Return the cells that are asked for."""
    wanted = [cell for cell in cells(config, stages, learned) if only in (None, cell.task.name)]
    if only is not None:
        config.task(only)
    if not learned and not wanted:
        raise BankError(f"no task of this run is trained yet in {config.run_dir}; train one first")
    if not wanted:
        raise BankError(f"the banks in {config.run_dir} do not reach the requested stages ({stages}); train the rest")
    return wanted


def _answer_cells(
    config: StreamConfig, wanted: Sequence[PlannedCell], by_number: Mapping[int, Bank], asking: Asking
) -> Path:
    """Answer and score cells with the banks by task number; return the path of `evaluation.json`."""
    names = {task.name for task in config.stream if task in [cell.task for cell in wanted]}
    records = asked_records(config, [config.task(name) for name in sorted(names)], asking)
    for name, opened in records.items():
        tell(name, task_folder(config, config.task(name)), opened.digest)
    switches = len({cell.banks for cell in wanted}) > 1
    blank = config.results_run_dir if asking.blank else None
    if blank is not None:
        write_blank(blank)
    session = EvaluationSession(
        config, list(by_number.values()), records, cached_images=True, switches=switches, blank=blank
    )
    questions, images = question_digests(config, records, asking.path), ImageDigests(config, records)
    origins = {
        cell.key: Origin(
            session.fingerprint(
                [by_number[number] for number in cell.banks],
                questions=questions.get(cell.task.name),  # If there are no questions, no answer has this fingerprint.
                fold=config.lora.fold,
                **asking.facts,
            ),
            images.of(cell.task) if cell.task.name in records and not asking.blank else None,
        )
        for cell in cells(config, "all", list(by_number))
    }
    facts = {
        f"the questions, banks or settings of {cell.task.name} at stage {cell.stage}": origins[cell.key]
        for cell in wanted
    }
    check_hosts(config.results_run_dir, facts)
    # Cells that the same banks answer are adjacent, so that each set of banks is merged once.
    scored: dict[Path, Scores] = {}
    rows = {
        cell.key: answer_cell(session, cell, [by_number[number] for number in cell.banks], origins[cell.key], scored)
        for cell in sorted(wanted, key=lambda cell: cell.banks)
    }
    target = ResultsTarget.of_run(config)
    if rank() == 0:
        possible = {folder: [origin] for folder, origin in origins.items()}
        write_summary(config, target, [row for cell in wanted if (row := rows[cell.key])], possible)
    barrier()
    return target.path


def answer_cell(
    session: EvaluationSession, cell: PlannedCell, banks: Sequence[Bank], origin: Origin, scored: dict[Path, Scores]
) -> Cell | None:
    """Answer and score a cell, unless that was done before; on the first rank, return its row of `evaluation.json`.

    Args:
        session: The loaded model and its questions.
        scored: By folder, the scores so far: a folder may hold several stages' cells.
    """
    folder, records = cell.folder, session.records[cell.task.name]

    def answer() -> dict[str, float]:
        return session.answer_merged(cell.task, banks, folder, origin)

    stamp = answer_once(folder, origin, len(records), answer)
    if rank() != 0:
        return None
    if folder not in scored:
        digests = [bank.digest for bank in banks]
        scored[folder] = score_file(
            folder / ANSWERS,
            folder,
            records,
            training=task_frequencies(session.config, cell.task),
            temperature=stored_temperature(session.config.results_run_dir, cell.task.name, digests),
            model=Path(session.config.model.path),
        )
    names, root = [bank.name for bank in banks], session.config.results_run_dir
    row = cell_row(cell.task, cell.stage, names, folder, root, stamp, records, scored[folder])
    warn_of_doubts(row, session.config.evaluation.max_new_tokens)
    return row
