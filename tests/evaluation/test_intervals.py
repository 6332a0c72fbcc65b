import math

import numpy as np
import pytest

from mslora_cr.evaluation.intervals import SAMPLES, holm, interval, randomization_test, resampled_means

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


def test_randomization_by_hand() -> None:
    # Of the 2^4 choices of signs of four equal differences, two are as far from zero as the one seen: p = 1/8.
    assert randomization_test([np.ones(4)]) == pytest.approx(1 / 8, abs=0.03)
    # 30 questions only one of two systems knows, 10 only the other: the exact McNemar test gives 0.0022.
    flips = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 200)
    assert randomization_test([flips]) == pytest.approx(0.0022, abs=0.003)
    assert randomization_test([np.zeros(5)]) == 1
    # Two groups that differ the same way say more than one; opposite ways they say nothing.
    assert randomization_test([np.ones(4), np.ones(4)]) == pytest.approx(2 / 2**8, abs=0.01)
    assert randomization_test([np.ones(4), -np.ones(4)]) == 1


def test_randomization_keeps_its_level() -> None:
    p_values = [randomization_test([RANDOM.integers(-1, 2, size=80).astype(float)]) for _ in range(200)]
    assert np.mean(np.array(p_values) <= 0.05) < 0.1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
