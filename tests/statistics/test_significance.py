import math

import numpy as np
import pytest

from mslora_cr.statistics.intervals import estimate_of, independent
from mslora_cr.statistics.significance import (
    flip_test,
    flipped_means,
    flips_for,
    holm,
    p_value,
    sign_test,
    t_test,
)

RANDOM = np.random.default_rng(5)


def randomization_test(*groups: np.ndarray, flips: int = 4000) -> float:
    flipped = [flipped_means(group, independent(len(group)), flips, stream) for stream, group in enumerate(groups)]
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
    sums, drawn = np.unique(flipped_means(differences, independent(count), 20_000) * count, return_counts=True)
    assert sums == pytest.approx(np.arange(-(2**count) + 1, 2**count, 2))
    assert drawn == pytest.approx(20_000 / 2**count, abs=6 * math.sqrt(20_000 / 2**count))


def test_flips_of_a_question_set_are_its_own() -> None:
    differences = RANDOM.normal(size=50)
    one, again, other = (flipped_means(differences, independent(50), 2000, stream) for stream in (1, 1, 2))
    assert np.array_equal(one, again)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    # two systems against a third one meet the same signs
    assert flipped_means(2 * differences, independent(50), 2000, 1) == pytest.approx(2 * one)


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


def test_questions_of_a_cluster_keep_one_sign() -> None:
    groups = np.array([0, 1, 0, 1])
    means = np.unique(flipped_means(np.array([1.0, 1.0, 3.0, 1.0]), groups, 2000))
    assert means == pytest.approx(np.array([-6, -2, 2, 6]) / 4)


def test_a_few_units_by_hand() -> None:
    assert flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert flip_test([1.0, -1.0]) == 1
    assert flip_test([1.0] * 20) == pytest.approx(1e-4, rel=0.5)  # by random signs: 2/2^20, or one of 10,001
    assert t_test(estimate_of([1.0, 2.0, 3.0])) == pytest.approx(0.0742, abs=1e-4)  # t = 3.464 of 2 degrees of freedom
    assert sign_test(5, 0) == 2 / 2**5
    assert sign_test(3, 1) == 2 * 5 / 16
    assert sign_test(2, 2) == sign_test(0, 0) == 1
