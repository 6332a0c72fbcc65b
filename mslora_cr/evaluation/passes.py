"""Further passes over the questions: without the picture, with rotated options, and over validation questions.

Each is an evaluation of the same banks, or of the same served model, in a folder of its own below the results
(`Asking`). What a pass says is read off its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from tabulate import tabulate

from mslora_cr.clinical.calibrated import CALIBRATION, CalibratedTask, Calibrations, calibrate
from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.records import DataError, TestRecords
from mslora_cr.distributed.comm import barrier, rank
from mslora_cr.evaluation.asking import AS_IT_IS, ON_VALIDATION, Asking, rotated_records, rotations
from mslora_cr.evaluation.probabilities import PROBABILITIES, read_probabilities
from mslora_cr.evaluation.results import Cell, Evaluation, read_evaluation
from mslora_cr.evaluation.score import SCORES, asked_in, group_numbers, question_groups, read_scores
from mslora_cr.metrics.typed import CHOICE
from mslora_cr.statistics.interval import Interval, bracketed
from mslora_cr.statistics.intervals import estimate, percent, score_interval
from mslora_cr.utils.state import Part, StateFile

CIRCULAR = "circular.json"
Evaluating = Callable[[Asking], Path]
"""Evaluates the same banks, or the same served model, in a further way; returns the path of `evaluation.json`."""


# --- every order of the options ---------------------------------------------------------------------------------------


class CircularTask(Part):
    """Questions with options of a task at a stage, in percent.

    Attributes:
        score: The share answered right in the file's order of options.
        circular: The share answered right in every order.
    """

    task: str
    stage: int
    questions: int
    score: float
    interval: Interval
    circular: float
    circular_interval: Interval


class CircularFile(StateFile):
    """`circular.json`: questions with options, right in every rotation of them (Liu et al., "MMBench", ECCV 2024)."""

    MEND: ClassVar[str] = "remove it; `mslora-cr evaluate CONFIG --circular` writes it again"

    cells: tuple[CircularTask, ...]


def evaluate_circular(config: StreamConfig, evaluating: Evaluating, results_dir: Path) -> Path:
    """Ask every rotation of the options, and write `circular.json`.

    Args:
        results_dir: The folder of the answers to the questions as they are.

    Raises:
        DataError: No question has options. As `evaluating`.
    """
    evaluation = read_evaluation(results_dir)
    cells = evaluation.cells if evaluation else ()
    records = {cell.task: AS_IT_IS.records(config, config.task(cell.task)) for cell in cells}
    most = max((len(record.options) for of_task in records.values() for record in of_task), default=0)
    if not most:
        raise DataError("--circular asks questions with options in every order, and no test question has options")
    folders = [evaluating(asking).parent for asking in rotations(most)]
    path = results_dir / CIRCULAR
    if rank() == 0:
        evaluations = {folder: read_evaluation(folder) for folder in folders}
        measured = [_circular(results_dir, cell, records[cell.task], evaluations) for cell in cells]
        CircularFile(cells=tuple(one for one in measured if one is not None)).write(path)
    barrier()
    return path


def _circular(
    results_dir: Path, cell: Cell, records: TestRecords, rotated: Mapping[Path, Evaluation | None]
) -> CircularTask | None:
    """Return what the rotations of a cell's questions say; None where one was not answered by the same banks, or none
    has options."""
    counts = np.array([len(record.options) for record in records])
    table = read_scores((results_dir / cell.answers).with_name(SCORES))
    first, always = table.columns[CHOICE], table.columns[CHOICE].copy()
    for by, (folder, evaluation) in enumerate(rotated.items(), 1):
        asked = counts > by
        of = next((other for other in evaluation.cells if other.key == cell.key), None) if evaluation else None
        if not asked.any():
            continue
        if of is None or (of.banks, of.questions) != (cell.banks, rotated_records(records, by).digest):
            return None
        answered = read_scores((folder / of.answers).with_name(SCORES)).columns[CHOICE]
        always[asked] = np.minimum(always[asked], answered)
    offered = counts > 0
    if not offered.any():
        return None
    groups = np.unique(table.groups[offered], return_inverse=True)[1]
    one, every = estimate(first[offered], groups), estimate(always[offered], groups)
    return CircularTask(
        task=cell.task,
        stage=cell.stage,
        questions=int(offered.sum()),
        score=100 * one.mean,
        interval=percent(score_interval([one])),
        circular=100 * every.mean,
        circular_interval=percent(score_interval([every])),
    )


def circular_table(results: CircularFile) -> str:
    """Return the scores as text."""
    rows = [
        [
            cell.task,
            cell.stage,
            cell.questions,
            f"{cell.score:.1f}{bracketed(cell.interval)}",
            f"{cell.circular:.1f}{bracketed(cell.circular_interval)}",
        ]
        for cell in results.cells
    ]
    return tabulate(rows, ["task", "stage", "with options", "right", "right in every order"], disable_numparse=True)


# --- validation -------------------------------------------------------------------------------------------------------


def evaluate_calibration(
    config: StreamConfig, evaluating: Evaluating, digests: Mapping[str, str], only: str | None = None
) -> Path:
    """Answer the validation questions of the tasks that have some, and write `calibration.json`.

    Args:
        digests: The digest of each bank, by name; a served model stands for itself.

    Raises:
        DataError: No task has any. As `evaluating`.
    """
    if not ON_VALIDATION.tasks(config, [config.task(only)] if only else config.stream):
        raise DataError(
            "--calibrate needs validation questions, and there are none: temperature and thresholds are fitted on "
            "nothing else. `mslora-cr data convert` and `data prepare` write val.jsonl where the source has a "
            "validation split; data.validation holds a share of the training records out, before training"
        )
    folder = evaluating(ON_VALIDATION).parent
    path = folder.parent / CALIBRATION
    if rank() == 0:
        evaluation = read_evaluation(folder)
        assert evaluation is not None, "it was just written"
        Calibrations(cells=tuple(_calibrated(config, cell, folder, digests) for cell in evaluation.cells)).write(path)
    barrier()
    return path


def _calibrated(config: StreamConfig, cell: Cell, folder: Path, digests: Mapping[str, str]) -> CalibratedTask:
    records = ON_VALIDATION.records(ON_VALIDATION.config(config), config.task(cell.task))
    answers = folder / cell.answers
    probabilities = read_probabilities(answers.with_name(PROBABILITIES))
    return calibrate(
        cell.task,
        cell.stage,
        [digests.get(name, name) for name in cell.banks],
        asked_in(answers, records),
        [one.logprob for one in probabilities] or [None] * len(records),
        group_numbers([group for _, group in question_groups(records)]),
    )
