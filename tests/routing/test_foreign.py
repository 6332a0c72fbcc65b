"""Questions that are like none of the tasks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mslora_cr.config.schema import Task
from mslora_cr.routing.foreign import (
    BOTH,
    LEVEL,
    foreign_p_values,
    squared_distances,
)
from mslora_cr.routing.foreign_questions import ForeignQuestions
from mslora_cr.routing.lda import TaskStatistics, combine, load_statistics, statistics_of
from tests.helpers.router import gram, learned

PICTURE_FEATURES = 4


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
    tasks = [learned(part[:400], PICTURE_FEATURES) for part in (one, two)]
    like, unlike = foreign_p_values(tasks, torch.cat([one[400:], two[400:]])), foreign_p_values(tasks, away)
    assert like is not None and unlike is not None
    assert (like < LEVEL).double().mean() <= 2 * LEVEL and (unlike < LEVEL).double().mean() > 0.95
    assert foreign_p_values([statistics_of(gram(one))], away) is None, "statistics of an earlier version"
    together = combine(tasks)
    assert together.distances is not None and together.distances.tolist() == sorted(
        torch.cat([task.distances for task in tasks if task.distances is not None]).tolist()
    )


def test_each_task_is_held_out_by_picture_and_by_text(tmp_path: Path) -> None:
    """Three tasks with like texts: the second has other pictures, the third has those of the first."""
    random = torch.Generator().manual_seed(5)
    shifts = torch.zeros(3, 10)
    shifts[1, :PICTURE_FEATURES] = 6.0
    features = [torch.randn(600, 10, generator=random) + shift for shift in shifts]
    statistics = [learned(part[:400], PICTURE_FEATURES) for part in features]
    path = tmp_path / "router.safetensors"
    save_file(statistics[0].tensors(), path)
    again = load_statistics(tmp_path)
    assert {name: of.tolist() for name, of in again.part_distances.items()} == {
        name: of.tolist() for name, of in statistics[0].part_distances.items()
    }
    tasks = [Task.model_construct(index=index, name=name) for index, name in enumerate("abc")]
    questions = ForeignQuestions(statistics, PICTURE_FEATURES, lambda task: features[task.index][400:])
    found = questions.held_out(3, tasks)
    assert found["b"][BOTH].auroc > 0.99 and found["b"]["picture"].detected > 95 and found["b"]["text"].auroc < 0.6
    assert found["c"][BOTH].auroc < 0.6 and found["c"][BOTH].detected < 5
    assert all(of.false_alarms <= 3 for of in found["b"].values())
    flagged = questions.flagged(1, tasks)
    assert flagged["picture"]["b"] > 190 and flagged["text"]["b"] < 10 and flagged[BOTH]["a"] < 10
    assert questions.held_out(1, tasks) == {}
    earlier = [TaskStatistics(of.count, of.mean, of.scatter, distances=of.distances) for of in statistics]
    assert set(ForeignQuestions(earlier, PICTURE_FEATURES, lambda task: features[task.index]).flagged(1, tasks)) == {
        BOTH
    }
