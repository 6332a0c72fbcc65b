import math

import numpy as np
import pytest

from mslora_cr.statistics.intervals import (
    SAMPLES,
    Estimate,
    difference_interval,
    estimate,
    independent,
    percent,
    percentile_interval,
    resampled_sums,
    score_interval,
    t_interval,
    weighted_sum,
)
from mslora_cr.statistics.matrix import TaskStageMatrix
from mslora_cr.statistics.matrix_intervals import Column, matrix_intervals

RANDOM = np.random.default_rng(5)


def test_a_mean_and_its_variance_by_hand() -> None:
    values, groups = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1])
    alone = estimate(values, independent(4))
    assert alone == (0.5, 0.5, pytest.approx(1 / 12), pytest.approx(3.0), 4, 4, pytest.approx(4), 0.25)
    # two clusters with sums of errors of 1 and -1: 2/1 · 2/16
    assert estimate(values, groups) == (0.5, 0.5, pytest.approx(0.25), pytest.approx(1.0), 2, 4, 2, 0.5)
    # clusters that happen to be alike do not make a mean certain
    assert estimate(values, np.array([0, 1, 0, 1])).variance == pytest.approx(1 / 12)
    assert estimate(values, np.zeros(4, dtype=int)).variance == 1.0


def test_a_sum_of_two_tasks_by_hand() -> None:
    total = weighted_sum(
        [Estimate(0.5, 0.5, 0.04, 4, 5, 10, 5, 0.2), Estimate(0.9, 0.8, 0.01, 9, 10, 10, 10, 0.1)], [0.5, 0.5]
    )
    assert total.mean == pytest.approx(0.7)
    assert (total.square, total.variance) == pytest.approx((0.65, 0.0125))
    assert total.freedom == pytest.approx(0.0125**2 / (0.01**2 / 4 + 0.0025**2 / 9))
    assert (total.groups, total.questions) == (15, 20)
    assert (total.effective, total.largest) == pytest.approx((1 / (0.25 / 5 + 0.25 / 10), 0.1))


def test_wilson_by_hand() -> None:
    scores = np.array([1.0] * 95 + [0.0] * 5)
    low, high = score_interval([estimate(scores, independent(100))])
    assert (low, high) == pytest.approx((0.8882, 0.9785), abs=2e-3)  # Wilson's of 95 in 100: 0.8882 to 0.9785
    assert score_interval([estimate(np.ones(80), independent(80))]) == (pytest.approx(80 / (80 + 1.99**2), abs=1e-4), 1)
    assert score_interval([estimate(np.zeros(80), independent(80))])[0] == 0
    assert score_interval([estimate(np.ones(80), np.arange(80) // 8)])[0] < 0.67  # ten images
    half = score_interval([estimate(np.tile([1.0, 0.0], 40), independent(80))])
    assert half == pytest.approx((0.391, 0.609), abs=2e-3)


def test_an_interval_of_many_scores_is_the_normal_one() -> None:
    scores = RANDOM.random(4000)
    error = scores.std() / math.sqrt(4000)
    for found in (
        score_interval([estimate(scores, independent(4000))]),
        difference_interval(estimate(scores, independent(4000)), binary=False),
    ):
        assert found == pytest.approx(scores.mean() + np.array([-1.96, 1.96]) * error, abs=error / 50)


def test_few_clusters_that_happen_to_be_alike_make_no_score_more_certain() -> None:
    scores = np.tile([1.0, 1.0, 1.0, 0.0], 20)
    scores[:4] = 1.0
    few = score_interval([estimate(scores, np.arange(80) // 8)])
    many = score_interval([estimate(scores, independent(80))])
    assert few[0] < many[0] and few[1] > many[1]


def test_no_difference_seen_is_none_for_certain() -> None:
    """With no difference, Tango's interval ends where Wilson's does: at t² / (n + t²)."""
    same = estimate(np.zeros(80), independent(80))
    end = 1.9905**2 / (80 + 1.9905**2)
    assert difference_interval(same, binary=True) == pytest.approx((-end, end), abs=1e-5)
    assert difference_interval(same, binary=False) == difference_interval(same, binary=True)


@pytest.mark.parametrize(("gained", "lost"), [(12, 2), (3, 3), (0, 5), (49, 0), (40, 10)])
def test_tangos_interval_ends_where_the_score_test_does(gained: int, lost: int) -> None:
    """The score test of a difference d, its shares of gained and lost questions found by search, not by formula."""
    n = 50
    values = np.array([1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost))
    for end in difference_interval(estimate(values, independent(n)), binary=True):
        if abs(end) > 1 - 1e-9:
            assert gained - lost == n * end
            continue
        shares = np.linspace(max(0, -end) + 1e-9, (1 - end) / 2 - 1e-9, 200_001)  # lost; gained are d more
        likelihood = gained * np.log(shares + end) + lost * np.log(shares) if lost else gained * np.log(shares + end)
        likelihood = likelihood + (n - gained - lost) * np.log1p(-2 * shares - end)
        share = shares[np.argmax(likelihood)]
        error = math.sqrt((2 * share + end - end**2) / (n * (n - 1) / n))  # the variance's own number is n - 1
        assert abs((gained - lost) / n - end) / error == pytest.approx(2.0096, abs=5e-3)


def test_one_changed_image_is_no_proof() -> None:
    """Eight questions of one image that change together say less than eight of as many images."""
    values = np.zeros(80)
    values[:8] = 1.0
    together = difference_interval(estimate(values, np.arange(80) // 8), binary=True)
    apart = difference_interval(estimate(values, independent(80)), binary=True)
    assert apart[0] > 0 > together[0]


def test_a_few_values_by_hand() -> None:
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert t_interval([1.0]) is None and t_interval([0.0, 0.0, 0.0]) is None
    assert t_interval([10.0, 10.0 + 1e-9]) is None  # equal but for rounding: nothing is seen of how they spread


def test_resampled_sums_are_of_whole_clusters() -> None:
    values = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    sums = resampled_sums(values, np.array([0, 0, 1, 1]))
    assert sums.shape == (SAMPLES, 2)
    assert {tuple(row) for row in sums} == {(4.0, 0.0), (2.0, 10.0), (0.0, 20.0)}
    assert np.array_equal(sums, resampled_sums(values, np.array([0, 0, 1, 1])))


def test_a_percentile_interval_of_few_clusters_is_wider() -> None:
    replicates = RANDOM.normal(size=20_000)
    many, few = percentile_interval(replicates, 10_000), percentile_interval(replicates, 10)
    assert many == pytest.approx((-1.96, 1.96), abs=0.05)
    assert few[1] == pytest.approx(2.262 * (10 / 9) ** 0.5, abs=0.1)


def test_files_that_stand_for_several_stages_have_no_difference() -> None:
    """Frozen banks answer a task once: its backward transfer is zero by construction, not by chance."""
    matrix = TaskStageMatrix(("a", "b"), ("a", "b"), {("a", 1): 50.0, ("a", 2): 50.0, ("b", 2): 50.0})
    column = Column(np.tile([0.0, 1.0], 20), independent(40))
    columns = dict.fromkeys(matrix.scores, column)
    same = matrix_intervals(matrix, columns, {("a", 1): "one", ("a", 2): "one", ("b", 2): "two"})
    assert same.figures["backward_transfer"] == same.transfer["a"] == ((0.0, 0.0), "", "")
    again = matrix_intervals(matrix, columns, {("a", 1): "one", ("a", 2): "other", ("b", 2): "two"})
    assert again.figures["backward_transfer"] == again.transfer["a"]
    end = 100 * 2.0227**2 / (40 + 2.0227**2)
    assert again.transfer["a"].ends == pytest.approx((-end, end), abs=1e-3)
    assert again.transfer["a"].changed == "0 of 40 changed (+0, -0), at most 7.2 % lost, McNemar p 1.000"
    assert again.transfer["a"].precision == "39 degrees of freedom, largest cluster 2.5 %"


@pytest.mark.parametrize("images", [False, True])
def test_a_difference_of_a_few_answers_has_interval_count_and_test(images: bool) -> None:
    """Four answers that all change in one direction do so by chance in one of eight cases, which McNemar's p says beside
    an interval that leaves zero out. Of two questions about one image that change against each other nothing moves."""
    matrix = TaskStageMatrix(("a", "b"), ("a", "b"), {("a", 1): 50.0, ("a", 2): 50.0, ("b", 2): 50.0})
    groups = np.arange(800) // 2 if images else independent(800)
    files = {cell: str(cell) for cell in matrix.scores}
    before, step = np.zeros(800), 2 if images else 1
    for changed in (4, 5):
        after = before.copy()
        after[: changed * step] = 1.0
        columns = {("a", 1): Column(before, groups), ("a", 2): Column(after, groups), ("b", 2): Column(before, groups)}
        found = matrix_intervals(matrix, columns, files)
        low, high = percent(difference_interval(estimate(after - before, groups), binary=True))
        assert low > 0
        assert found.transfer["a"] == found.figures["backward_transfer"]
        assert found.transfer["a"].changed.startswith(
            f"{changed * step} of 800 changed (+{changed * step}, -0), at most"
        )
        assert found.transfer["a"].changed.endswith(f"McNemar p {2 / 2**changed:.3f}")
        assert found.transfer["a"].ends == pytest.approx((low, high))
    columns["a", 1] = Column(np.tile([1.0, 0.0], 400), groups)
    columns["a", 2] = Column(np.tile([0.0, 1.0], 400), groups)
    against = matrix_intervals(matrix, columns, files).transfer["a"]
    assert against.changed.startswith("800 of 800 changed (+400, -400)") and against.changed.endswith("p 1.000")
    assert against.ends[0] < 0 < against.ends[1]
