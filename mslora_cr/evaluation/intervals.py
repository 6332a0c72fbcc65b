"""Bootstrap intervals and paired tests of scores that are known question by question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
"""Resamplings behind an interval, and random signs behind a test."""
SEED = 0
BLOCK = 50
CONFIDENCE = 0.95

Scores = NDArray[np.float64]


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


def randomization_test(differences: Sequence[Scores]) -> float:
    """Two-sided p-value of the paired approximate randomization test, ``(1 + c) / (1 + SAMPLES)``.

    If two systems answered equally well, each question's difference could as well have the other sign. c counts the
    random choices of signs whose mean difference, averaged over groups, is at least as far from zero as the one seen.
    Source: Yeh, "More Accurate Tests for the Statistical Significance of Result Differences", COLING 2000.

    Args:
        differences: for each group of questions (a task), the difference of each question's scores; every group
            weighs the same, whatever its size.
    """
    generator = np.random.default_rng(SEED)
    seen, drawn = 0.0, np.zeros(SAMPLES)
    for group in differences:
        moved = group[group != 0]
        seen += group.sum() / len(group)
        for start in range(0, len(moved), 4096):  # signs of some questions for all samples at once
            part = moved[start : start + 4096]
            signs = generator.integers(0, 2, size=(SAMPLES, len(part)), dtype=np.int8) * 2 - 1
            drawn += signs @ part / len(group)
    # Sums in another order differ in their last digits; an equal draw must count.
    return float((1 + np.count_nonzero(np.abs(drawn) >= abs(seen) - 1e-12)) / (1 + SAMPLES))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given: ``max_{j<=i} min(1, (m - j + 1) p_(j))``.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        worst = max(worst, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = worst
    return adjusted
