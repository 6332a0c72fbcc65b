"""Bootstrap intervals and paired tests of scores that are known question by question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
"""Resamplings behind an interval."""
FLIPS, FLIPS_PER_TEST = 10_000, 100
"""Random choices of signs behind a test: the least, and for each test of a family."""
SEED = 0
BLOCK = 50
CONFIDENCE = 0.95

Scores = NDArray[np.float64]
_SIGNS = (np.arange(256)[:, None] >> np.arange(8) & 1) * 2.0 - 1
"""Signs of eight questions, (256, 8): a row for each byte."""


def resampled_means(scores: Scores, stream: int = 0) -> Scores:
    """Means over questions drawn with replacement, as many as there are.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 1979.

    Args:
        scores: (questions, columns); NaN where a column has no score for a question. All columns of a draw see the
            same questions, so that differences between them stay paired.
        stream: another random stream for each set of questions; the same stream and number draw the same questions.

    Returns:
        (SAMPLES, columns); NaN where no drawn question has the column's score.
    """
    questions, columns = scores.shape
    generator = np.random.default_rng([SEED, stream])
    known = ~np.isnan(scores)
    values = np.hstack([np.where(known, scores, 0.0), known])
    sums = np.empty((SAMPLES, 2 * columns))
    for start in range(0, SAMPLES, BLOCK):  # a block shares each read of the scores
        drawn = generator.integers(questions, size=(min(BLOCK, SAMPLES - start), questions), dtype=np.int32)
        counts = np.stack([np.bincount(row, minlength=questions) for row in drawn]).astype(np.float64)
        np.matmul(counts, values, out=sums[start : start + len(drawn)])
    with np.errstate(invalid="ignore"):
        return sums[:, :columns] / sums[:, columns:]


def interval(replicates: Sequence[float] | Scores) -> tuple[float, float]:
    """The percentile interval of `CONFIDENCE` of bootstrap replicates; NaN ones are left out."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(np.asarray(replicates, dtype=np.float64), [tail, 100 - tail])
    return float(low), float(high)


def flips_for(tests: int) -> int:
    """How many flips a family of this many tests needs: `FLIPS`, or `FLIPS_PER_TEST` for each of them.

    A p-value of n flips is at least 1 / (n + 1), and Holm's method multiplies the least of m by m. Of 80 none could
    come out below 0.08 with 1,000 flips; with 100 m flips it can come out below 0.01.
    """
    return max(FLIPS, FLIPS_PER_TEST * tests)


def flipped_means(differences: Scores, flips: int, stream: int = 0) -> Scores:
    """Mean differences after flips of the questions' signs, each at random: what there would be to see if both systems
    answered equally well.

    Eight questions share a random byte and a table of the 256 sums that their signs can give, so that memory does not
    grow with questions times flips.

    Args:
        differences: (questions,), of two systems' scores.
        stream: another random stream for each set of questions; the same stream, number and flips draw the same signs.

    Returns:
        (flips,).
    """
    generator = np.random.default_rng([SEED + 1, stream])  # not the resampling's
    moved = differences[differences != 0]
    sums = np.zeros(flips)
    for eight in np.pad(moved, (0, -len(moved) % 8)).reshape(-1, 8):
        sums += (_SIGNS @ eight)[generator.integers(256, size=flips, dtype=np.uint8)]
    return sums / len(differences)


def p_value(seen: float, flipped: Scores) -> float:
    """Two-sided p-value of the paired approximate randomization test, ``(1 + c) / (1 + flips)``.

    c counts the flips whose mean difference is at least as far from zero as the one seen. Sources: Yeh, "More Accurate
    Tests for the Statistical Significance of Result Differences", COLING 2000; for the ones, Phipson and Smyth,
    "Permutation P-values Should Never Be Zero", Statistical Applications in Genetics and Molecular Biology 2010.

    Args:
        flipped: as `flipped_means` gives it, or the mean of several such, for the mean over their sets of questions.
    """
    # Sums in another order differ in their last digits; an equal draw must count.
    return float((1 + np.count_nonzero(np.abs(flipped) >= abs(seen) - 1e-12)) / (1 + len(flipped)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given: ``max_{j<=i} min(1, (m - j + 1) p_(j))``.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        worst = max(worst, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def span(ends: tuple[float, float] | None, digits: int = 1) -> str:
    """An interval's ends as text; empty without one."""
    # Adding zero turns -0.0, which rounding leaves, into 0.0.
    return "" if ends is None else " to ".join(f"{round(end, digits) + 0:.{digits}f}" for end in ends)
