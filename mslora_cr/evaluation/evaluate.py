"""Answer and score tasks at stages of a run: the diagonal as published, or the whole task × stage matrix."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mslora_cr.bank_stack import BankStack
from mslora_cr.banks import Bank, BankError, file_digest
from mslora_cr.config import ConfigError, StreamConfig, Task
from mslora_cr.data.collator import Preprocessing, QuestionSamples
from mslora_cr.data.records import TestRecords
from mslora_cr.evaluation.generate import (
    ANSWERS,
    Decoding,
    answer_once,
    answer_questions,
    fingerprint_of,
    read_stamp,
)
from mslora_cr.evaluation.score import score_file
from mslora_cr.files import write_json
from mslora_cr.methods import METHODS
from mslora_cr.runtime import (
    CachedTower,
    base_digest,
    cached_tower,
    check_hosts,
    load_base,
    preprocessing,
    start_processes,
    task_folder,
    task_image_roots,
)
from mslora_cr.training.distributed import own_device, rank, wait_for_all
from mslora_cr.training.ledger import Ledger, environment

Stages = Literal["own", "final", "seen", "all"]
"""`own`: each task at its own stage (published); `final`: all after the last stage; `seen`: each at every stage from
its own on; `all`: at every stage, and at stage 0, where the base model answers without a bank (zero shot)."""


Place = tuple[str, int]
"""Of a cell in the matrix: task and stage."""


@dataclass(frozen=True)
class Cell:
    """A task to answer at a stage, the banks that answer it, and where its answers go. Stages count from 1; 0 is the
    base model."""

    task: Task
    stage: int
    banks: tuple[int, ...]
    folder: Path

    @property
    def place(self) -> Place:
        return self.task.name, self.stage


def cells(config: StreamConfig, stages: Stages, learned: Sequence[int]) -> list[Cell]:
    """The cells to fill. Cells of one task that the same banks answer share one folder, hence one answering.

    Args:
        learned: positions, from 1, of the tasks whose banks exist.
    """
    method, found = METHODS[config.method], []
    answering = method.stages(learned, len(config.tasks))
    for task in config.stream:
        number, places = task.index + 1, {}
        own = method.banks(number, number, config.evaluation.banks_by)
        places[tuple(own)] = config.results_run_dir / task.name
        for stage in stages_of(task, stages, config):
            banks = tuple(method.banks(number, stage, config.evaluation.banks_by)) if stage else ()
            if stage not in (0, *answering) or not set(banks) <= set(learned):
                continue
            folder = places.setdefault(banks, config.results_run_dir / task.name / f"stage-{stage}")
            found.append(Cell(task, stage, banks, folder))
    return found


def stages_of(task: Task, stages: Stages, config: StreamConfig) -> Sequence[int]:
    """The stages at which a task is to be answered."""
    own, last = task.index + 1, len(config.tasks)
    return {"own": [own], "final": [last], "seen": range(own, last + 1), "all": range(last + 1)}[stages]


def evaluate(
    config: StreamConfig,
    stages: Stages = "own",
    only: str | None = None,
    banks: Mapping[str, Bank] | None = None,
) -> Path:
    """Answer and score every learned task, or only the one named; returns the path of `evaluation.json`.

    Args:
        banks: the banks by task, where they do not come from the run folder's ledger.

    Raises:
        ConfigError, DataError, ModelError, BankError: before anything is answered.
    """
    if config.evaluation.banks_by == "routed":
        raise ConfigError("evaluation.banks_by is routed, which evaluate_routed answers")
    start_processes(config)
    chain = dict(banks) if banks is not None else finished_banks(config)
    learned = [task.index + 1 for task in config.stream if task.name in chain]
    wanted = [cell for cell in cells(config, stages, learned) if only in (None, cell.task.name)]
    if only is not None:
        config.task(only)
    if not learned and not wanted:
        raise BankError(f"no task of this run is trained yet in {config.run_dir}; train one first")
    if not wanted:
        raise BankError(f"the banks in {config.run_dir} do not reach the stages asked for ({stages}); train the rest")
    by_number = {task.index + 1: chain[task.name] for task in config.stream if task.name in chain}
    names = {task.name for task in config.stream if task in [cell.task for cell in wanted]}
    records = {name: TestRecords(task_folder(config, config.task(name)) / "test.jsonl") for name in sorted(names)}
    session, questions = _Session(config, by_number), question_digests(config, records)
    fingerprints = {
        cell.place: session.fingerprint(cell.banks, questions.get(cell.task.name))
        for cell in cells(config, "all", learned)
    }
    facts = {
        f"the questions, banks or settings of {cell.task.name} at stage {cell.stage}": fingerprints[cell.place]
        for cell in wanted
    }
    check_hosts(config.results_run_dir, facts)
    # Cells that the same banks answer are adjacent, so that a stage is folded once.
    rows = {
        cell.place: session.answer(cell, records[cell.task.name], fingerprints[cell.place])
        for cell in _by_banks(wanted)
    }
    path = config.results_run_dir / "evaluation.json"
    if rank() == 0:
        possible = {place: [fingerprint] for place, fingerprint in fingerprints.items()}
        write_summary(config, path, [rows[cell.place] for cell in wanted], possible)
    wait_for_all()
    return path


def finished_banks(config: StreamConfig) -> dict[str, Bank]:
    """The banks that the run folder's ledger records, by task."""
    ledger = Ledger.read(config)
    done = [task for task in config.stream if ledger.done(task.name)]
    return {task.name: bank for task, bank in zip(done, ledger.banks(config, done), strict=True)}


def question_digests(config: StreamConfig, records: Mapping[str, TestRecords]) -> dict[str, str]:
    """SHA-256 of the test file of every task that has one.

    Args:
        records: by task, the files that are open; they are not read again.
    """
    paths = {task.name: task_folder(config, task) / "test.jsonl" for task in config.stream}
    others = {name: file_digest(path) for name, path in paths.items() if name not in records and path.is_file()}
    return others | {name: found.digest for name, found in records.items()}


def _by_banks(wanted: Sequence[Cell]) -> list[Cell]:
    return sorted(wanted, key=lambda cell: cell.banks)


class _Session:
    """The base model, loaded when the first question needs it, with the banks that are folded in now."""

    def __init__(self, config: StreamConfig, banks: Mapping[int, Bank]) -> None:
        self.config = config
        self.banks = banks
        self._decisive = decisive(config)
        self._loaded: tuple[BankStack, Preprocessing, CachedTower | None] | None = None
        self._folded: tuple[int, ...] | None = None
        self._scored: set[Path] = set()

    def answer(self, cell: Cell, records: TestRecords, fingerprint: str) -> dict[str, Any]:
        """Answer and score a cell, unless that was done before; on the first rank its row of `evaluation.json`."""
        stamp = answer_once(cell.folder, fingerprint, lambda: self._answer(cell, records, fingerprint))
        if rank() != 0:
            return {}
        if cell.folder not in self._scored:  # a folder may hold several stages' cells
            score_file(cell.folder / ANSWERS, cell.folder)
            self._scored.add(cell.folder)
        names = [self.banks[number].name for number in cell.banks]
        return cell_row(cell.task, cell.stage, names, cell.folder, self.config.results_run_dir, stamp, records)

    def _answer(self, cell: Cell, records: TestRecords, fingerprint: str) -> dict[str, float]:
        stack, prepare, tower = self._model()
        if self._folded != cell.banks:
            stack.freeze([self.banks[number] for number in cell.banks])
            stack.model.eval()
            self._folded = cell.banks
        roots = task_image_roots(self.config, cell.task)
        if tower is not None:
            tower.fill(prepare.image_paths(records, roots), decoding(self.config).workers)
        samples = QuestionSamples(records, roots, prepare)
        label = f"{cell.task.name} with {'+'.join(self.banks[number].name for number in cell.banks) or 'no bank'}"
        return answer_questions(stack.model, samples, cell.folder, decoding(self.config), fingerprint, label)

    def _model(self) -> tuple[BankStack, Preprocessing, CachedTower | None]:
        if self._loaded is None:
            base = load_base(self.config, own_device(self.config.model.device))
            tower = cached_tower(self.config, base)
            stack = BankStack(base.model, self.config.lora.fold, reuse=True)
            self._loaded = (stack, preprocessing(self.config, base, tower), tower)
        return self._loaded

    def fingerprint(self, banks: Sequence[int], questions: str | None) -> str:
        """What decides a cell's answers; of questions that are not there, it is no answer's fingerprint."""
        return fingerprint_of(
            {
                **self._decisive,
                "banks": [self.banks[number].digest for number in banks],
                "scalings": [self.banks[number].scaling for number in banks],
                "questions": questions,
                "fold": self.config.lora.fold,
            }
        )


def decoding(config: StreamConfig) -> Decoding:
    return Decoding(
        max_new_tokens=config.evaluation.max_new_tokens,
        batch_size=config.evaluation.batch_size,
        model_id=Path(config.model.path).name,
        workers=int(config.training.get("dataloader_num_workers", 0)),
    )


def decisive(config: StreamConfig) -> dict[str, Any]:
    """What decides answers, whoever gives them; reads some of the base model's weights."""
    return {
        "model": config.model.model_dump(exclude={"device", "path"}),
        "weights": base_digest(config),
        "data": config.data.model_dump(exclude={"root", "check_images", "cache_image_features"}),
        "max_new_tokens": config.evaluation.max_new_tokens,
    }


def cell_row(
    task: Task,
    stage: int,
    banks: Sequence[str],
    folder: Path,
    root: Path,
    stamp: Mapping[str, Any],
    records: TestRecords,
) -> dict[str, Any]:
    """A row of `evaluation.json`, once the answers in `folder`, somewhere below `root`, are scored.

    Args:
        stamp: the answers' `answers.json`: fingerprint, seconds and share of padding.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {
        "task": task.name,
        "stage": stage,
        "banks": list(banks),
        "answers": str((folder / ANSWERS).relative_to(root)),
        "questions": records.digest,
        "rows": len(records),
        **stamp,
        "metrics": metrics["metrics"],
        "intervals": metrics["intervals"],
    }


def write_summary(
    config: StreamConfig, path: Path, rows: Sequence[dict[str, Any]], possible: Mapping[Place, Collection[str]]
) -> dict[str, Any]:
    """Merge this call's cells into `evaluation.json`, task by task and stage by stage; returns what it now contains.

    Its cells are all of the same model, asked the same questions in the same way: one of an earlier call stays only if
    its answers are still those that it was scored from, and if these banks, questions and settings would give them
    again. Cells that are left out are printed.

    Args:
        possible: the fingerprints that answers to a cell can have with these banks, questions and settings.
    """
    old = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    merged = {(row["task"], row["stage"]): row for row in rows}
    left_out: dict[str, list[str]] = defaultdict(list)
    for row in old:
        place = row["task"], row["stage"]
        if place in merged:
            continue
        stamp = read_stamp((path.parent / row["answers"]).parent).get("fingerprint")
        if stamp == row["fingerprint"] and stamp in possible.get(place, ()):
            merged[place] = row
        else:
            left_out[row["task"]].append(str(row["stage"]))
    if left_out:
        places = "; ".join(f"{task} at stage {', '.join(stages)}" for task, stages in left_out.items())
        print(f"{path}: left out, because other banks, questions or settings gave the answers: {places}")
    order = [task.name for task in config.tasks]
    kept = [merged[place] for place in sorted(merged, key=lambda place: (order.index(place[0]), place[1]))]
    summary = {
        "run": config.run,
        "method": config.method,
        "banks_by": config.evaluation.banks_by,
        "tasks": order,
        "modalities": {task.name: task.modality for task in config.stream},
        "published": {task.name: config.datasets[task.name].published for task in config.tasks},
        "stages": sorted({row["stage"] for row in kept}),
        "cells": kept,
        "environment": environment(),
    }
    write_json(path, summary)
    return summary
