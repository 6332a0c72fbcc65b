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


def squared_distances(statistics: TaskStatistics, features: Tensor) -> Tensor:
    """(questions,) float64, from (questions, features): the squared Mahalanobis distance to a task's mean."""
    covariance = shrunken(statistics.scatter.double() / max(1, statistics.count - 1))
    centred = features.double() - statistics.mean.double()
    return torch.linalg.solve_triangular(cholesky(covariance), centred.T, upper=False).square().sum(0)


def held_out_distances(features: Tensor, folds: Tensor, total: Tensor, grams: Tensor) -> Tensor:
    """(records,) float32: the distance of each record from the statistics of all other folds.

    Args:
        features: (records, features) of some of a task's records.
        folds: (records,) int64, the fold of each.
        total: The gram of all records, as `statistics_of` takes it.
        grams: (folds, …), by fold the same.
    """
    distances = torch.zeros(len(features))
    for fold, gram in enumerate(grams):
        rest = total - gram
        if (folds == fold).any() and rest[-1, -1] > 1:
            distances[folds == fold] = squared_distances(statistics_of(rest), features[folds == fold]).float()
    return distances


def foreign_p_values(tasks: Sequence[TaskStatistics], features: Tensor) -> Tensor | None:
    """(questions,) float64: the largest p-value of a question over the tasks, ``(1 + #{held out >= score}) / (n + 1)``;
    None where a task's statistics have no held-out distances, as those of earlier versions."""
    values = []
    for task in tasks:
        if task.distances is None or not len(task.distances):
            return None
        scores = squared_distances(task, features).float()
        below = torch.searchsorted(task.distances, scores)
        values.append((1 + len(task.distances) - below).double() / (len(task.distances) + 1))
    return torch.stack(values).amax(0) if values else None
