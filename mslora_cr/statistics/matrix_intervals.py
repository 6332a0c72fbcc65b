"""The uncertainty of what is read off a task × stage matrix, from the scores of its questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mslora_cr.statistics.intervals import (
    Estimate,
    Groups,
    Interval,
    Scores,
    counted,
    estimate,
    percent,
    score_interval,
    shown_difference,
    weighted_sum,
)
from mslora_cr.statistics.matrix import TaskStageMatrix, Weights
from mslora_cr.utils.errors import DataError


class Column(NamedTuple):
    """A metric's scores in [0, 1], by question, and each question's cluster."""

    scores: Scores
    groups: Groups


class Uncertainty(NamedTuple):
    """The ends of a number's interval, in percent or points; where too few questions changed for one, None, and how
    many of how many did."""

    ends: Interval | None
    changed: str = ""


class MatrixIntervals(NamedTuple):
    """The uncertainty of what is read off a task × stage matrix: its figures by name, each task's backward transfer,
    and the average over the tasks learned by each stage. Forgetting has none."""

    figures: dict[str, Uncertainty]
    transfer: dict[str, Uncertainty]
    stages: dict[int, Interval]


def matrix_intervals(
    matrix: TaskStageMatrix, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> MatrixIntervals:
    """The uncertainty of every figure whose cells are all there.

    Scores of a task at several stages are paired by question, so that a difference of stages is as uncertain as the
    questions that changed, and no more. The tasks stay as they are: intervals are over other questions, not tasks. A
    difference has one where at least `intervals.CHANGED` questions changed, or images where several are about one.

    Args:
        columns: by task and stage. answers: by task and stage, the name of the file that holds the answers. Where one
            file stands for both sides of a difference, there is none by construction, and its interval is 0 to 0.

    Raises:
        DataError: a task has scores of more questions at one stage than at another.
    """
    known = {figure for figure, value in matrix.summary().items() if value is not None}
    stages = [stage for stage, _ in matrix.stage_averages()]
    return MatrixIntervals(
        figures={
            figure: _uncertainty(weights, columns, answers)
            for figure, weights in matrix.linear().items()
            if figure in known
        },
        transfer={task: _uncertainty(matrix.backward_weights([task]), columns, answers) for task in matrix.transfer()},
        stages={stage: _average(*_parts(matrix.stage_weights(stage), columns)) for stage in stages},
    )


def _uncertainty(
    weights: Weights, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> Uncertainty:
    difference = min(weights.values(), default=-1.0) < 0
    if difference and all(len({answers[cell] for cell in cells}) == 1 for cells in _by_task(weights).values()):
        return Uncertainty((0.0, 0.0))
    parts, shares = _parts(weights, columns)
    if not difference:
        return Uncertainty(_average(parts, shares))
    total = weighted_sum(parts, shares)
    binary = all(is_binary(columns[cell].scores) for cell in weights)
    return Uncertainty(shown_difference(total, binary), counted(total.changed, total.questions))


def _average(parts: Sequence[Estimate], shares: Sequence[float]) -> Interval:
    return percent(score_interval(parts, shares))


def _by_task(weights: Weights) -> dict[str, list[tuple[str, int]]]:
    return {task: [cell for cell in weights if cell[0] == task] for task, _ in weights}


def _parts(weights: Weights, columns: Mapping[tuple[str, int], Column]) -> tuple[list[Estimate], list[float]]:
    """By task, the weighted sum of its cells, and its share in the figure."""
    parts, shares = [], []
    for cells in _by_task(weights).values():
        share = sum(max(weights[cell], 0.0) for cell in cells)
        parts.append(_part({cell: weights[cell] / share for cell in cells}, columns))
        shares.append(share)
    return parts, shares


def _part(weights: Weights, columns: Mapping[tuple[str, int], Column]) -> Estimate:
    """The weighted sum of one task's cells, question by question."""
    counts = {stage: len(columns[task, stage].scores) for task, stage in weights}
    if len(set(counts.values())) > 1:
        task = next(iter(weights))[0]
        counted = ", ".join(f"{count} at stage {stage}" for stage, count in sorted(counts.items()))
        raise DataError(f"{task} has scores of different questions ({counted}); evaluate it again at all these stages")
    values = sum((weight * columns[cell].scores for cell, weight in weights.items()), np.zeros(()))
    return estimate(values, coarsest([columns[cell].groups for cell in weights]))


def coarsest(groups: list[Groups]) -> Groups:
    """Of several accounts of the same questions' clusters the one with the fewest: scores that an earlier version wrote
    know of none."""
    return min(groups, key=lambda numbers: int(numbers.max()))


def is_binary(scores: Scores) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(scores, (0.0, 1.0)).all())
