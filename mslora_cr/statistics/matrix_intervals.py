"""Intervals of the figures of a task × stage matrix, from the scores of its questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mslora_cr.statistics.interval import precision
from mslora_cr.statistics.intervals import (
    Estimate,
    Groups,
    Interval,
    Scores,
    estimate,
    percent,
    score_interval,
    weighted_sum,
)
from mslora_cr.statistics.matrix import TaskStageMatrix, Weights
from mslora_cr.statistics.paired import PairedTask, paired_change, paired_task
from mslora_cr.utils.errors import DataError


class Column(NamedTuple):
    """A metric's scores in [0, 1] and each question's cluster."""

    scores: Scores
    groups: Groups


class Uncertainty(NamedTuple):
    """The uncertainty of a number.

    Attributes:
        ends: The ends of its interval, in percent or points.
        changed: For a difference, how many answers changed, the bound of losses and McNemar's p, as text.
        precision: The degrees of freedom and the largest cluster's share, as text.
    """

    ends: Interval
    changed: str = ""
    precision: str = ""


class MatrixIntervals(NamedTuple):
    """The uncertainty of a task × stage matrix's figures: by name, each task's backward transfer, and the average over
    the tasks learned by each stage. Forgetting has none."""

    figures: dict[str, Uncertainty]
    transfer: dict[str, Uncertainty]
    stages: dict[int, Interval]


def matrix_intervals(
    matrix: TaskStageMatrix, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> MatrixIntervals:
    """Return the uncertainty of every figure whose cells are all there.

    Scores of a task at several stages are paired by question, so that a difference of stages is only as uncertain as
    the questions that changed. The tasks are fixed: intervals describe other questions, not other tasks.

    Args:
        columns: By task and stage.
        answers: By task and stage, the name of the file that holds the answers. If one file stands for both sides of a
            task's difference, the difference is zero by construction, and its interval is 0 to 0.

    Raises:
        DataError: A task has scores of more questions at one stage than at another.
    """
    defined = {figure for figure, value in matrix.summary().items() if value is not None}
    stages = [stage for stage, _ in matrix.stage_averages()]
    return MatrixIntervals(
        figures={
            figure: _uncertainty(weights, columns, answers)
            for figure, weights in matrix.linear().items()
            if figure in defined
        },
        transfer={task: _uncertainty(matrix.backward_weights([task]), columns, answers) for task in matrix.transfer()},
        stages={stage: _average(*_parts(matrix.stage_weights(stage), columns)) for stage in stages},
    )


def _uncertainty(
    weights: Weights, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> Uncertainty:
    if min(weights.values(), default=-1.0) < 0:
        return _difference(weights, columns, answers)
    parts, shares = _parts(weights, columns)
    total = weighted_sum(parts, shares)
    return Uncertainty(_average(parts, shares), precision=precision(total.freedom, total.largest))


def _difference(
    weights: Weights, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> Uncertainty:
    """Return the interval of a difference of stages; without any task it is exactly 0."""
    tasks: list[PairedTask] = []
    shares: list[float] = []
    for cells in _by_task(weights).values():
        share = sum(max(weights[cell], 0.0) for cell in cells)
        values, groups = _values({cell: weights[cell] / share for cell in cells}, columns)
        binary = all(is_binary(columns[cell].scores) for cell in cells)
        tasks.append(paired_task(values, groups, binary, same=len({answers[cell] for cell in cells}) == 1))
        shares.append(share)
    change = paired_change(tasks, shares)
    return Uncertainty(change.ends, change.counted(), change.precision())


def _average(parts: Sequence[Estimate], shares: Sequence[float]) -> Interval:
    return percent(score_interval(parts, shares))


def _by_task(weights: Weights) -> dict[str, list[tuple[str, int]]]:
    return {task: [cell for cell in weights if cell[0] == task] for task, _ in weights}


def _parts(weights: Weights, columns: Mapping[tuple[str, int], Column]) -> tuple[list[Estimate], list[float]]:
    """Return the weighted sum of each task's cells, and the task's share in the figure."""
    parts, shares = [], []
    for cells in _by_task(weights).values():
        share = sum(max(weights[cell], 0.0) for cell in cells)
        parts.append(_part({cell: weights[cell] / share for cell in cells}, columns))
        shares.append(share)
    return parts, shares


def _part(weights: Weights, columns: Mapping[tuple[str, int], Column]) -> Estimate:
    return estimate(*_values(weights, columns))


def _values(weights: Weights, columns: Mapping[tuple[str, int], Column]) -> tuple[Scores, Groups]:
    """Return the weighted sum of one task's cells, question by question, and its clusters."""
    counts = {stage: len(columns[task, stage].scores) for task, stage in weights}
    if len(set(counts.values())) > 1:
        task = next(iter(weights))[0]
        counted = ", ".join(f"{count} at stage {stage}" for stage, count in sorted(counts.items()))
        raise DataError(f"{task} has scores of different questions ({counted}); evaluate it again at all these stages")
    values = sum((weight * columns[cell].scores for cell, weight in weights.items()), np.zeros(()))
    return values, coarsest([columns[cell].groups for cell in weights])


def coarsest(groups: list[Groups]) -> Groups:
    """Return the grouping with the fewest clusters of several groupings of the same questions: scores of earlier
    versions know none."""
    return min(groups, key=lambda numbers: int(numbers.max()))


def is_binary(scores: Scores) -> bool:
    """Return whether every score is 0 or 1."""
    return bool(np.isin(scores, (0.0, 1.0)).all())
