"""The variance of a mean over clusters of unequal size, and its degrees of freedom."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Groups = NDArray[np.int64]
"""The number of each question's cluster, from 0."""


class ClusterVariance(NamedTuple):
    """The variance of a mean, and how precisely it is known.

    Attributes:
        variance: The variance of the mean.
        freedom: The degrees of freedom of the variance.
        effective: The number of equally large clusters with the same weight, ``n² / Σ n_g²`` (Kish 1965).
        largest: The largest cluster's share of the questions.
    """

    variance: float
    freedom: float
    clusters: int
    effective: float
    largest: float


def cluster_variance(errors: Scores, groups: Groups) -> ClusterVariance:
    """Return the CR2 variance of a mean with Bell and McCaffrey's degrees of freedom.

    With n_g the size of a cluster and s_g the sum of its errors, the variance is ``Σ s_g² / (1 - n_g/n) / n²``. One
    large cluster pulls the mean towards itself, so its own errors come out too small; the factor corrects them. With
    clusters of one size it is the usual ``G/(G-1) Σ s_g² / n²`` with G - 1 degrees of freedom. Sources: Bell and
    McCaffrey, "Bias Reduction in Standard Errors for Linear Regression with Multi-Stage Samples", Survey Methodology
    2002; for the intra-class correlation in the degrees of freedom, Imbens and Kolesár, "Robust Standard Errors in
    Small Samples: Some Practical Advice", Review of Economics and Statistics 2016.

    Args:
        errors: (questions,), the values minus their mean.
        groups: (questions,), with at least two clusters.
    """
    counts = np.bincount(groups)
    sums, sizes = np.bincount(groups, errors)[counts > 0], counts[counts > 0].astype(np.float64)
    count = sizes.sum()
    variance = float((np.square(sums) / (1 - sizes / count)).sum() / count**2)
    return ClusterVariance(
        variance,
        freedom=degrees_of_freedom(sizes, intraclass_correlation(errors, groups)),
        clusters=len(sizes),
        effective=float(count**2 / np.square(sizes).sum()),
        largest=float(sizes.max() / count),
    )


def degrees_of_freedom(sizes: Scores, correlation: float) -> float:
    """Return Bell and McCaffrey's degrees of freedom, ``tr² M / tr M²``, of the CR2 variance of a mean.

    ``M_gh = a_g a_h [(1 - ρ) R + ρ R Rᵀ]_gh`` with ``R = diag(n_g) - n_g n_h / n`` and ``a_g = (1 - n_g/n)^(-1/2)``.
    M is a diagonal matrix plus one of rank two, so time and memory grow with the number of clusters alone.

    Args:
        sizes: (clusters,), at least two.
        correlation: ρ, the intra-class correlation, in [0, 1].
    """
    count, squares = sizes.sum(), np.square(sizes).sum()
    weights = 1 / (1 - sizes / count)
    diagonal = weights * ((1 - correlation) * sizes + correlation * sizes**2)
    one, two = np.sqrt(weights) * sizes, np.sqrt(weights) * sizes**2
    # M = diag(diagonal) + outer · one oneᵀ + cross · (one twoᵀ + two oneᵀ)
    outer = -(1 - correlation) / count + correlation * squares / count**2
    cross = -correlation / count
    ones, twos, mixed = one @ one, two @ two, one @ two
    trace = diagonal.sum() + outer * ones + 2 * cross * mixed
    square = (
        np.square(diagonal).sum()
        + 2 * (diagonal * (outer * one**2 + 2 * cross * one * two)).sum()
        + outer**2 * ones**2
        + 4 * outer * cross * ones * mixed
        + 2 * cross**2 * (ones * twos + mixed**2)
    )
    return float(trace**2 / square)


def intraclass_correlation(values: Scores, groups: Groups) -> float:
    """Return the share of a value's variance that lies between clusters, by analysis of variance, limited to [0, 1].

    Source: Donner, "A Review of Inference Procedures for the Intraclass Correlation Coefficient in the One-Way Random
    Effects Model", International Statistical Review 1986.

    Args:
        values: (questions,).
        groups: (questions,), with at least two clusters.
    """
    sizes = np.bincount(groups)
    sums = np.bincount(groups, values)[sizes > 0]
    sizes = sizes[sizes > 0]
    count, clusters = len(values), len(sizes)
    if count == clusters:
        return 0.0
    between_sum = float((np.square(sums) / sizes).sum() - values.sum() ** 2 / count)
    within = (float(np.square(values).sum()) - float((np.square(sums) / sizes).sum())) / (count - clusters)
    between = between_sum / (clusters - 1)
    typical = (count - np.square(sizes).sum() / count) / (clusters - 1)
    total = between + (typical - 1) * within
    return float(np.clip((between - within) / total, 0.0, 1.0)) if total > 0 else 0.0
