"""Questions that are like none of the tasks."""

import pytest
import torch

from mslora_cr.routing.foreign import FOLDS, LEVEL, foreign_p_values, held_out_distances, squared_distances
from mslora_cr.routing.lda import TaskStatistics, combine, statistics_of


def gram(features: torch.Tensor) -> torch.Tensor:
    wide = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
    return wide.T @ wide


def learned(features: torch.Tensor) -> TaskStatistics:
    folds = torch.arange(len(features)) % FOLDS
    grams = torch.stack([gram(features[folds == fold]) for fold in range(FOLDS)])
    distances = held_out_distances(features, folds, grams.sum(0), grams).sort().values
    known = statistics_of(grams.sum(0))
    return TaskStatistics(known.count, known.mean, known.scatter, distances=distances)


def test_distances_are_mahalanobis_under_the_shrunken_covariance() -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    known = statistics_of(gram(features))
    covariance = features.double().T.cov()
    variances = covariance.diagonal()
    shrunken = 0.9 * covariance + torch.diag(0.1 * variances + 1e-3 * variances.mean())
    centred = features.double() - features.double().mean(0)
    expected = (centred @ torch.linalg.inv(shrunken) * centred).sum(1)
    assert squared_distances(known, features) == pytest.approx(expected, rel=1e-4)


def test_false_alarms_keep_the_level_and_other_tasks_are_found() -> None:
    """More features than a covariance of so few records tells apart: in-sample distances would flag most questions."""
    random = torch.Generator().manual_seed(1)
    mixing = torch.randn(40, 40, generator=random) / 40**0.5
    one, two, away = (torch.randn(800, 40, generator=random) @ mixing + shift for shift in (0.0, 3.0, -3.0))
    tasks = [learned(part[:400]) for part in (one, two)]
    like, unlike = foreign_p_values(tasks, torch.cat([one[400:], two[400:]])), foreign_p_values(tasks, away)
    assert like is not None and unlike is not None
    assert (like < LEVEL).double().mean() <= 2 * LEVEL and (unlike < LEVEL).double().mean() > 0.95
    assert foreign_p_values([statistics_of(gram(one))], away) is None, "statistics of an earlier version"
    together = combine(tasks)
    assert together.distances is not None and together.distances.tolist() == sorted(
        torch.cat([task.distances for task in tasks if task.distances is not None]).tolist()
    )
