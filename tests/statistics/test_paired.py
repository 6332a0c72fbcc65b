"""Clusters of unequal size and paired differences over tasks, against worked examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from mslora_cr.statistics.cluster_robust import cluster_variance, degrees_of_freedom, intraclass_correlation
from mslora_cr.statistics.intervals import difference_interval, estimate, independent
from mslora_cr.statistics.paired import PairedTask, paired_change, paired_task

FIXTURES = Path(__file__).parents[1] / "fixtures" / "statistics"
TRANSFER = json.loads((FIXTURES / "backward_transfer.json").read_text())
CLUSTERED = json.loads((FIXTURES / "clustered_mean.json").read_text())


def changes(gained: int, lost: int, questions: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [gained, lost, questions - gained - lost])


def task(gained: int, lost: int, questions: int) -> PairedTask:
    return paired_task(changes(gained, lost, questions), independent(questions), binary=True)


def test_cr2_and_its_degrees_of_freedom_are_those_of_the_worked_example() -> None:
    hits, clusters = np.array(CLUSTERED["hit"], dtype=float), np.array(CLUSTERED["cluster"])
    found = cluster_variance(hits - hits.mean(), clusters)
    assert found.variance == pytest.approx(CLUSTERED["variance_cr2"])
    assert (found.clusters, found.largest, found.effective) == (5, 0.3, pytest.approx(100 / 24))
    sizes = np.bincount(clusters).astype(float)
    for correlation, wanted in CLUSTERED["df_bm"].items():
        assert degrees_of_freedom(sizes, float(correlation)) == pytest.approx(wanted)
    large = np.array([103.0, 103.0, *[394 / 72] * 72])  # 74 images, two of them hold a third of 600 questions
    assert degrees_of_freedom(large, 0.2) == pytest.approx(2.496, abs=1e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
def test_degrees_of_freedom_without_the_matrix_are_those_with_it(correlation: float) -> None:
    sizes = np.random.default_rng(1).integers(1, 30, size=40).astype(float)
    residual = np.diag(sizes) - np.outer(sizes, sizes) / sizes.sum()
    scale = (1 - sizes / sizes.sum()) ** -0.5
    matrix = np.outer(scale, scale) * ((1 - correlation) * residual + correlation * residual @ residual.T)
    wanted = np.trace(matrix) ** 2 / np.trace(matrix @ matrix)
    assert degrees_of_freedom(sizes, correlation) == pytest.approx(wanted)


def test_clusters_of_one_size_have_one_degree_of_freedom_less_than_there_are() -> None:
    values = np.random.default_rng(2).random(80)
    found = estimate(values, np.arange(80) // 8)
    assert found.freedom == pytest.approx(9)
    sums = (values - values.mean()).reshape(10, 8).sum(axis=1)
    assert found.variance == pytest.approx(10 / 9 * np.square(sums).sum() / 80**2)


def test_the_correlation_within_clusters_by_hand() -> None:
    values, clusters = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1, 2, 2])
    # between: 2 · (0.5² + 0 + 0.5²) / 2 = 0.5; within: 0.5 / 3
    assert intraclass_correlation(values, clusters) == pytest.approx((0.5 - 1 / 6) / (0.5 + 1 / 6))
    assert intraclass_correlation(values, independent(6)) == 0


@pytest.mark.parametrize("case", TRANSFER["cases"])
def test_mover_over_tasks(case: dict[str, Any]) -> None:
    tasks = [task(*counts) for counts in case["tasks_gained_lost_questions"]]
    for known, wanted in zip(tasks, case["per_task_tango_t"], strict=True):
        assert difference_interval(known.total, binary=True) == pytest.approx(wanted, abs=1e-9)
    found = paired_change(tasks, [1 / len(tasks)] * len(tasks))
    assert found.ends == pytest.approx([100 * end for end in case["mover"]], abs=1e-7)


@pytest.mark.parametrize("case", TRANSFER["few_changes"])
def test_a_few_changes_have_interval_bound_and_test(case: dict[str, Any]) -> None:
    counts = case["gained"], case["lost"], case["n"]
    found = paired_change([task(*counts)])
    assert found.ends == pytest.approx([100 * end for end in case["tango"]], abs=1e-7)
    assert (found.gained, found.lost, found.questions) == counts
    assert found.most_lost == pytest.approx(100 * beta.ppf(0.95, case["lost"] + 1, case["n"] - case["lost"]))
    pairs = case["gained"] + case["lost"]
    assert found.p == pytest.approx(binomtest(case["lost"], pairs).pvalue if pairs else 1.0)
    assert f"{pairs} of 80 changed" in found.counted() and "79 degrees of freedom" in found.precision()


def test_none_of_eighty_lost_may_still_be_three_in_a_hundred() -> None:
    assert paired_change([task(0, 0, 80)]).most_lost == pytest.approx(3.68, abs=0.01)


def test_a_task_that_one_file_answers_adds_no_width() -> None:
    same = paired_task(np.zeros(40), independent(40), binary=True, same=True)
    alone, both = paired_change([task(2, 9, 80)]), paired_change([same, task(2, 9, 80)], [0.5, 0.5])
    assert both.ends == pytest.approx([end / 2 for end in alone.ends])
    assert paired_change([same]).ends == (0.0, 0.0) and paired_change([same]).counted() == ""


def test_clusters_count_once_in_the_exact_test_and_widen_the_bound() -> None:
    """Eight questions of one image are lost together: one of ten images, p 1."""
    values = np.zeros(80)
    values[:8] = -1.0
    together = paired_change([paired_task(values, np.arange(80) // 8, binary=True)])
    apart = paired_change([paired_task(values, independent(80), binary=True)])
    assert (together.p, apart.p) == (1.0, pytest.approx(2 / 2**8))
    assert together.most_lost > apart.most_lost == pytest.approx(100 * beta.ppf(0.95, 9, 72))
    assert together.lost == apart.lost == 8
