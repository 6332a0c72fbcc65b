"""Questions that are like none of the tasks: how far their features lie from each task's, against held-out records.

A router is sure of a question that is like none of its tasks, since its probabilities sum to 1. Here each task is
asked alone. The score is the squared Mahalanobis distance to the task's mean under the task's own shrunken covariance.
The conformal p-value compares it with those of records that the statistics had not seen. Sources: Lee et al., "A Simple
Unified Framework for Detecting Out-of-Distribution Samples", NeurIPS 2018; Vovk, Gammerman and Shafer, "Algorithmic
Learning in a Random World", 2005; for folds in the place of one held-out part, Vovk, "Cross-conformal predictors",
Annals of Mathematics and Artificial Intelligence 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mslora_cr.routing.lda import TaskStatistics, cholesky, shrunken, statistics_of

FOLDS = 5
"""Parts of a task's records, each of which is measured by the statistics of the others."""
LEVEL = 0.01
"""A question whose largest p-value over the tasks is below this is like none of them. At most this share of questions
that are exchangeable with a task's training records is."""


BOTH, PICTURE, TEXT = "picture and text", "picture", "text"


def part_columns(picture_features: int) -> dict[str, slice]:
    """Return the features by which a question may be foreign: all, those of its picture, and those of its text."""
    return {BOTH: slice(None), PICTURE: slice(picture_features), TEXT: slice(picture_features, None)}


def squared_distances(statistics: TaskStatistics, features: Tensor, columns: slice = slice(None)) -> Tensor:
    """Return (questions,) float64, from (questions, features): the squared Mahalanobis distance to a task's mean, in
    some of the features.
    """
    scatter, mean = statistics.scatter[columns, columns], statistics.mean[columns]
    covariance = shrunken(scatter.double() / max(1, statistics.count - 1))
    centred = features[:, columns].double() - mean.double()
    return torch.linalg.solve_triangular(cholesky(covariance), centred.T, upper=False).square().sum(0)


def held_out_distances(
    features: Tensor, folds: Tensor, total: Tensor, grams: Tensor, columns: slice = slice(None)
) -> Tensor:
    """Return (records,) float32: the distance of each record from the statistics of all other folds.

    Args:
        features: (records, features) of some of a task's records.
        folds: (records,) int64, the fold of each.
        total: The gram of all records, as `statistics_of` takes it.
        grams: (folds, …), by fold the same.
        columns: The features that count.
    """
    distances = torch.zeros(len(features))
    for fold, gram in enumerate(grams):
        rest = total - gram
        if (folds == fold).any() and rest[-1, -1] > 1:
            distances[folds == fold] = squared_distances(statistics_of(rest), features[folds == fold], columns).float()
    return distances


def task_p_values(
    task: TaskStatistics, features: Tensor, part: str = BOTH, columns: slice = slice(None)
) -> Tensor | None:
    """Return (questions,) float64: the p-value of each question for a task, ``(1 + #{held out >= score}) / (n + 1)``;
    None where the task's statistics have no held-out distances of this part, as those of earlier versions.

    Args:
        task: The task's statistics.
        features: (questions, features).
        part: The features that count, by a name of `part_columns`.
        columns: The same by their places.
    """
    distances = task.distances if part == BOTH else task.part_distances.get(part)
    if distances is None or not len(distances):
        return None
    below = torch.searchsorted(distances, squared_distances(task, features, columns).float())
    return (1 + len(distances) - below).double() / (len(distances) + 1)


def foreign_p_values(tasks: Sequence[TaskStatistics], features: Tensor) -> Tensor | None:
    """Return (questions,) float64: the largest p-value of a question over the tasks; None where that of a task is not
    known.
    """
    values = [task_p_values(task, features) for task in tasks]
    p_values = [p for p in values if p is not None]
    return torch.stack(p_values).amax(0) if p_values and len(p_values) == len(values) else None
