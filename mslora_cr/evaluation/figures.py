"""Intervals of what is read off a task × stage matrix, from the scores of its questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mslora_cr.data.records import DataError
from mslora_cr.evaluation.intervals import (
    Estimate,
    Groups,
    Interval,
    Scores,
    difference_interval,
    estimate,
    percent,
    score_interval,
    weighted_sum,
)
from mslora_cr.evaluation.matrix import TaskStageMatrix, Weights


class Column(NamedTuple):
    """A metric's scores in [0, 1], by question, and each question's cluster."""

    scores: Scores
    groups: Groups


class MatrixIntervals(NamedTuple):
    """Intervals of what is read off a task × stage matrix, in percent or points: its figures by name, each task's
    backward transfer, and the average over the tasks learned by each stage. Forgetting has none."""

    figures: dict[str, Interval]
    transfer: dict[str, Interval]
    stages: dict[int, Interval]


def matrix_intervals(
    matrix: TaskStageMatrix, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> MatrixIntervals:
    """The intervals of every figure whose cells are all there.

    Scores of a task at several stages are paired by question, so that a difference of stages is as uncertain as the
    questions that changed, and no more. The tasks stay as they are: intervals are over other questions, not tasks.

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
            figure: _interval(weights, columns, answers)
            for figure, weights in matrix.linear().items()
            if figure in known
        },
        transfer={task: _interval(matrix.backward_weights([task]), columns, answers) for task in matrix.transfer()},
        stages={stage: _interval(matrix.stage_weights(stage), columns, answers) for stage in stages},
    )


def _interval(
    weights: Weights, columns: Mapping[tuple[str, int], Column], answers: Mapping[tuple[str, int], str]
) -> Interval:
    tasks = {task: [cell for cell in weights if cell[0] == task] for task, _ in weights}
    difference = min(weights.values(), default=-1.0) < 0
    if difference and all(len({answers[cell] for cell in cells}) == 1 for cells in tasks.values()):
        return 0.0, 0.0
    parts, shares = [], []
    for cells in tasks.values():
        share = sum(max(weights[cell], 0.0) for cell in cells)
        parts.append(_part({cell: weights[cell] / share for cell in cells}, columns))
        shares.append(share)
    if not difference:
        return percent(score_interval(parts, shares))
    binary = all(is_binary(columns[cell].scores) for cell in weights)
    return percent(difference_interval(weighted_sum(parts, shares), binary))


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
