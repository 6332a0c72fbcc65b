"""Tests of paired differences: by sign flips, by Student's t, by wins and losses; and their correction for number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy

from mslora_cr.statistics.intervals import SEED, Estimate, Groups, Scores

FLIPS, FLIPS_PER_TEST = 10_000, 100
"""The number of random sign choices behind a test: the minimum, and for each test of a family."""
ALL_SIGNS = 13
"""With up to so many units, every choice of signs is tried instead of random ones."""

_SIGNS = (np.arange(256)[:, None] >> np.arange(8) & 1) * 2.0 - 1
"""Signs of eight clusters, (256, 8): a row for each byte."""


def flips_for(tests: int) -> int:
    """Return the number of flips for a family of so many tests: `FLIPS`, or `FLIPS_PER_TEST` for each of them.

    A p-value from n flips is at least 1 / (n + 1), and Holm's method multiplies the smallest of m by m. With 1,000
    flips, none of 80 could be below 0.08; with 100 m flips it can be below 0.01.
    """
    return max(FLIPS, FLIPS_PER_TEST * tests)


def flipped_means(differences: Scores, groups: Groups, flips: int, stream: int = 0) -> Scores:
    """Return mean differences after random sign flips: what would be observed if both systems answered equally well.

    All questions of a cluster keep one sign, since they are not independent. Eight clusters share a random byte and a
    table of the 256 sums that their signs can give, so that memory does not grow with clusters times flips.

    Args:
        differences: (questions,), of two systems' scores.
        groups: (questions,), the number of each question's cluster.
        stream: A separate random stream for each set of questions; the same stream, number and flips draw the same
            signs.

    Returns:
        (flips,).
    """
    generator = np.random.default_rng([SEED + 1, stream])
    moved = np.bincount(groups, differences)
    moved = moved[moved != 0]
    sums = np.zeros(flips)
    for eight in np.pad(moved, (0, -len(moved) % 8)).reshape(-1, 8):
        sums += (_SIGNS @ eight)[generator.integers(256, size=flips, dtype=np.uint8)]
    return sums / len(differences)


def p_value(seen: float, flipped: Scores) -> float:
    """Return the two-sided p-value of the paired approximate randomization test, ``(1 + c) / (1 + flips)``.

    c counts the flips whose mean difference is at least as far from zero as the observed one. Sources: Yeh, "More
    Accurate Tests for the Statistical Significance of Result Differences", COLING 2000; for the ones, Phipson and
    Smyth, "Permutation P-values Should Never Be Zero", Statistical Applications in Genetics and Molecular Biology 2010.

    Args:
        seen: The observed mean difference.
        flipped: From `flipped_means`, or the mean of several of its results, for the mean over their sets of questions.
    """
    # Sums in another order differ in their last digits, but an equal draw must count.
    return float((1 + np.count_nonzero(np.abs(flipped) >= abs(seen) - 1e-12)) / (1 + len(flipped)))


def flip_test(values: Sequence[float]) -> float:
    """Return the two-sided p-value of the sign-flip test that paired differences of a few units are around zero.

    With up to `ALL_SIGNS` units every choice of signs is tried, the observed one included, so p is at least ``2 /
    2^n``. Source: Fisher, The Design of Experiments, 1935.
    """
    units = np.asarray(values, dtype=np.float64)
    if len(units) > ALL_SIGNS:
        return p_value(float(units.mean()), flipped_means(units, np.arange(len(units)), FLIPS))
    signs = (np.arange(2 ** len(units))[:, None] >> np.arange(len(units)) & 1) * 2.0 - 1
    sums = np.abs(signs @ units)
    return float(np.mean(sums >= abs(units.sum()) - 1e-9))


def t_test(total: Estimate) -> float:
    """Return the two-sided p-value of Student's t test that a mean is zero.

    The values must not all be equal, since their spread would be unknown.
    """
    return float(2 * scipy.special.stdtr(total.freedom, -abs(total.mean) / total.variance**0.5))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the sign test without ties.

    Source: Dixon and Mood, "The Statistical Sign Test", JASA 1946.
    """
    return min(1.0, 2 * float(scipy.special.bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the given order: ``max_{j<=i} min(1, (m - j + 1) p_(j))``.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        worst = max(worst, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = worst
    return adjusted
