import math

import numpy as np
import pytest

from mslora_cr.evaluation.intervals import SAMPLES, flipped_means, flips_for, holm, interval, p_value, resampled_means

RANDOM = np.random.default_rng(5)


def test_an_interval_meets_the_normal_one_of_many_scores() -> None:
    scores = RANDOM.random((4000, 2))
    means = resampled_means(scores)
    assert means.shape == (SAMPLES, 2)
    for column, draws in zip(scores.T, means.T, strict=True):
        error = column.std() / math.sqrt(len(column))
        assert interval(draws) == pytest.approx(column.mean() + np.array([-1.96, 1.96]) * error, abs=error / 4)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    truth, covered = 0.7, 0
    for _ in range(200):
        low, high = interval(resampled_means((RANDOM.random((60, 1)) < truth).astype(float))[:, 0])
        covered += low <= truth <= high
    assert 0.88 < covered / 200 < 0.99


def test_questions_without_a_score_are_left_out() -> None:
    some = np.array([[1.0, np.nan], [0.0, 0.5], [1.0, np.nan], [0.0, 0.5]])
    means = resampled_means(some)
    assert np.nanmin(means[:, 1]) == np.nanmax(means[:, 1]) == 0.5
    assert np.isnan(means[:, 1]).any()  # a draw without such a question has no mean
    assert interval(means[:, 1]) == (0.5, 0.5)


def test_columns_are_drawn_together_and_streams_apart() -> None:
    scores = RANDOM.random((50, 1))
    paired = resampled_means(np.hstack([scores, scores + 0.25]))
    assert paired[:, 1] - paired[:, 0] == pytest.approx(np.full(SAMPLES, 0.25))
    assert abs(np.corrcoef(resampled_means(scores, 1)[:, 0], resampled_means(scores, 2)[:, 0])[0, 1]) < 0.15


def randomization_test(*groups: np.ndarray, flips: int = 4000) -> float:
    flipped = [flipped_means(group, flips, stream) for stream, group in enumerate(groups)]
    return p_value(float(np.mean([group.mean() for group in groups])), np.mean(flipped, axis=0))


def test_randomization_by_hand() -> None:
    # Of the 2^4 choices of signs of four equal differences, two are as far from zero as the one seen: p = 1/8.
    assert randomization_test(np.ones(4)) == pytest.approx(1 / 8, abs=0.03)
    # 30 questions only one of two systems knows, 10 only the other: the exact McNemar test gives 0.0022.
    differences = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 200)
    assert randomization_test(differences) == pytest.approx(0.0022, abs=0.003)
    assert randomization_test(np.zeros(5)) == 1
    # Two groups that differ the same way say more than one; opposite ways they say nothing.
    assert randomization_test(np.ones(4), np.ones(4)) == pytest.approx(2 / 2**8, abs=0.01)
    assert randomization_test(np.ones(4), -np.ones(4)) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_choice_of_signs_is_as_likely(count: int) -> None:
    differences = 2.0 ** np.arange(count)  # every choice has a sum of its own
    sums, drawn = np.unique(flipped_means(differences, 20_000) * count, return_counts=True)
    assert sums == pytest.approx(np.arange(-(2**count) + 1, 2**count, 2))
    assert drawn == pytest.approx(20_000 / 2**count, abs=6 * math.sqrt(20_000 / 2**count))


def test_flips_of_a_question_set_are_its_own() -> None:
    differences = RANDOM.normal(size=50)
    one, again, other = (flipped_means(differences, 2000, stream) for stream in (1, 1, 2))
    assert np.array_equal(one, again)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    # two systems against a third one meet the same signs
    assert flipped_means(2 * differences, 2000, 1) == pytest.approx(2 * one)


def test_randomization_keeps_its_level() -> None:
    p_values = [randomization_test(RANDOM.integers(-1, 2, size=80).astype(float), flips=1000) for _ in range(200)]
    assert np.mean(np.array(p_values) <= 0.05) < 0.1


@pytest.mark.parametrize("tests", [1, 8, 80, 1000])
def test_any_family_can_come_out_significant(tests: int) -> None:
    flips = flips_for(tests)
    assert flips >= 10_000
    assert min(holm([1 / (1 + flips)] + [1.0] * (tests - 1))) < 0.01


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
