"""Statistics of tasks for the router, from features alone."""

import torch

from mslora_cr.routing.foreign import BOTH, FOLDS, held_out_distances, part_columns
from mslora_cr.routing.lda import TaskStatistics, statistics_of


def gram(features: torch.Tensor) -> torch.Tensor:
    wide = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
    return wide.T @ wide


def learned(features: torch.Tensor, picture_features: int) -> TaskStatistics:
    """A task's statistics with held-out distances, from (records, features)."""
    folds = torch.arange(len(features)) % FOLDS
    grams = torch.stack([gram(features[folds == fold]) for fold in range(FOLDS)])
    parts = {
        part: held_out_distances(features, folds, grams.sum(0), grams, columns).sort().values
        for part, columns in part_columns(picture_features).items()
    }
    known = statistics_of(grams.sum(0))
    return TaskStatistics(known.count, known.mean, known.scatter, distances=parts.pop(BOTH), part_distances=parts)
