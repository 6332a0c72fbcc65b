"""Intervals of scores that are known question by question, where several questions may be about one image.

Questions about one image (or one patient) form a cluster: they are right or wrong together more often than questions
about different ones, so an interval that treats them as independent is too narrow. Everything here is one pass over the
questions; `python -m benchmarks.coverage` measures how often each interval covers the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from mslora_cr.statistics.cluster_robust import ClusterVariance, Groups, Scores, cluster_variance
from mslora_cr.statistics.interval import CONFIDENCE, Interval

SAMPLES = 1000
"""The number of resamplings behind a bootstrap interval."""
SEED = 0
BLOCK = 50
NONE = 1e-12
"""Smaller than any score, or its square, that is not zero."""


class Estimate(NamedTuple):
    """A mean over questions, or a weighted sum of such means, with everything that its interval needs.

    Attributes:
        square: The mean of the squared values.
        variance: The variance of the mean.
        freedom: The degrees of freedom of the variance.
        groups: The number of clusters.
        effective: The number of equally large clusters with the same weight.
        largest: The largest cluster's share of the questions.
    """

    mean: float
    square: float
    variance: float
    freedom: float
    groups: int
    questions: int
    effective: float
    largest: float


def independent(questions: int) -> Groups:
    """Return clusters of one question each."""
    return np.arange(questions)


def estimate(values: Scores, groups: Groups) -> Estimate:
    """Return the mean of a value over questions, with its cluster-robust variance (`cluster_variance`).

    If all clusters have the same mean by chance, the variance is that of independent questions. A single cluster says
    nothing about the differences between clusters, so its variance is as large as possible.

    Args:
        values: (questions,), at least one, in [-1, 1].
        groups: (questions,).
    """
    count, mean, square = len(values), float(values.mean()), float(np.square(values).mean())
    if np.count_nonzero(np.bincount(groups)) == 1:
        return _estimate(mean, square, count, ClusterVariance(1.0, 1.0, 1, 1.0, 1.0))
    errors = values - mean
    clustered = cluster_variance(errors, groups)
    if clustered.variance < NONE:
        clustered = clustered._replace(variance=float(np.square(errors).sum()) / (count * (count - 1)))
    return _estimate(mean, square, count, clustered)


def _estimate(mean: float, square: float, questions: int, clustered: ClusterVariance) -> Estimate:
    return Estimate(
        mean,
        square,
        clustered.variance,
        clustered.freedom,
        clustered.clusters,
        questions,
        clustered.effective,
        clustered.largest,
    )


def weighted_sum(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted sum of estimates from different questions, with Satterthwaite's degrees of freedom.

    Source: Satterthwaite, "An Approximate Distribution of Estimates of Variance Components", Biometrics 1946.
    """
    variances = [weight**2 * part.variance for weight, part in zip(weights, parts, strict=True)]
    total = sum(variances)
    spread = sum(variance**2 / part.freedom for variance, part in zip(variances, parts, strict=True))
    return Estimate(
        mean=sum(weight * part.mean for weight, part in zip(weights, parts, strict=True)),
        square=sum(weight * part.square for weight, part in zip(weights, parts, strict=True)),
        variance=total,
        freedom=total**2 / spread if spread else sum(part.freedom for part in parts),
        groups=sum(part.groups for part in parts),
        questions=sum(part.questions for part in parts),
        effective=1 / sum(weight**2 / part.effective for weight, part in zip(weights, parts, strict=True)),
        largest=max(abs(weight) * part.largest for weight, part in zip(weights, parts, strict=True)),
    )


def score_interval(parts: Sequence[Estimate], weights: Sequence[float] = (1.0,)) -> Interval:
    """Return the interval of a weighted mean of scores in [0, 1]: Wilson's, with an effective number of questions.

    With p the mean and V its variance, the effective number is ``p (1 - p) / V``, and Student's t replaces the normal
    quantile. The interval stays within [0, 1] and has a width at 0 and 1, where the number is that of the clusters. A
    task whose answers are all wrong, or all right, counts as if half an answer more went the other way. A task's
    variance is at least that of independent questions, since with few clusters it can be smaller by chance. Sources:
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927; for the effective number
    Korn and Graubard, "Confidence Intervals for Proportions with Small Expected Number of Positive Counts Estimated
    from Survey Data", Survey Methodology 1998.

    Args:
        parts: The estimates, by task.
        weights: The weights of the tasks, which sum to 1.
    """
    total = weighted_sum([_careful(part) for part in parts], weights)
    mean = min(max(total.mean, 0.0), 1.0)
    spread = mean * (1 - mean)
    number = spread / total.variance if spread > NONE else total.effective
    square = quantile(total.freedom) ** 2 / number
    centre = (mean + square / 2) / (1 + square)
    half = (square * (spread + square / 4)) ** 0.5 / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(total: Estimate, binary: bool) -> Interval:
    """Return the interval of a paired difference of scores in [0, 1], of one task.

    If scores are 0 or 1, or no score differs, it is Tango's score interval, with an effective number of questions, ``(S
    - d²) / variance`` with S the share of questions whose scores differ, and with Student's t in place of the normal
    quantile: it does not take a few differences, or none, for certainty. Otherwise it is Student's t. Source: Tango,
    "Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design",
    Statistics in Medicine 1998.
    """
    if not binary and total.variance > 0:
        low, high = mean_interval(total)
        return max(-1.0, low), min(1.0, high)
    spread = total.square - total.mean**2
    number = spread / total.variance if min(spread, total.variance) > NONE else total.effective
    gained, lost = (total.square + total.mean) / 2, (total.square - total.mean) / 2
    errors = quantile(total.freedom)
    return _tango(gained, lost, number, errors), -_tango(lost, gained, number, errors)


def _tango(gained: float, lost: float, number: float, errors: float) -> float:
    """Return the lower end of Tango's interval: the difference d that lies so many standard errors below the observed
    one, at the likeliest shares of gained and lost questions that differ by d.

    Args:
        gained: The share of gained questions.
        lost: The share of lost questions.
        errors: The number of standard errors.
    """
    seen = gained - lost

    def beyond(d: float) -> float:
        b = (2 - seen) * d - gained - lost
        likeliest = (max(b * b + 8 * lost * d * (1 - d), 0.0) ** 0.5 - b) / 4  # The share of lost questions.
        return float((seen - d) * number**0.5 - errors * max(2 * likeliest + d * (1 - d), 0.0) ** 0.5)

    nearest = seen - NONE  # If no score differs, the observed difference itself is no standard error away.
    return float(scipy.optimize.brentq(beyond, -1.0, nearest)) if nearest > -1 else -1.0


def t_interval(values: Sequence[float]) -> Interval | None:
    """Return Student's t interval of a mean of independent values, such as differences of tasks.

    None for fewer than two values, and for values that are all equal, since their spread is unknown.
    """
    if len(values) < 2:
        return None
    total = estimate_of(values)
    return mean_interval(total) if total.variance > NONE else None


def estimate_of(values: Sequence[float]) -> Estimate:
    """Return the mean of at least two independent values."""
    count = len(values)
    square = float(np.square(values).mean())
    variance = float(np.var(values, ddof=1)) / count
    return Estimate(float(np.mean(values)), square, variance, count - 1.0, count, count, count, 1 / count)


def mean_interval(total: Estimate) -> Interval:
    """Return Student's t interval, without bounds."""
    half = quantile(total.freedom) * total.variance**0.5
    return total.mean - half, total.mean + half


def resampled_sums(values: Scores, groups: Groups) -> Scores:
    """Return sums over clusters drawn with replacement, as many as there are, for values that are no means, such as
    corpus BLEU.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 1979.

    Args:
        values: (questions, columns).
        groups: (questions,).

    Returns:
        (SAMPLES, columns).
    """
    clusters = _cluster_sums(values, groups)
    generator = np.random.default_rng(SEED)
    sums = np.empty((SAMPLES, values.shape[1]))
    for start in range(0, SAMPLES, BLOCK):  # The replicates of a block share each read of the values.
        drawn = generator.integers(len(clusters), size=(min(BLOCK, SAMPLES - start), len(clusters)), dtype=np.int32)
        counts = np.stack([np.bincount(row, minlength=len(clusters)) for row in drawn]).astype(np.float64)
        np.matmul(counts, clusters, out=sums[start : start + len(drawn)])
    return sums


def percentile_interval(replicates: Scores, groups: float) -> Interval:
    """Return the percentile interval of bootstrap replicates, expanded to Student's t for the number of clusters.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 2015.

    Args:
        replicates: (resamplings,).
        groups: The number of clusters; for clusters of unequal size, one more than the degrees of freedom of a mean.
    """
    if groups < 2:
        return float(replicates.min()), float(replicates.max())
    tail = 100 * scipy.special.ndtr(-((groups / (groups - 1)) ** 0.5) * quantile(groups - 1))
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def _cluster_sums(values: Scores, groups: Groups) -> Scores:
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums[np.bincount(groups) > 0]


def _careful(part: Estimate) -> Estimate:
    """A task's variance, at least that of independent questions. A task without an error, or without a right answer,
    counts half an answer that was not observed."""
    variance = max(part.variance, (part.square - part.mean**2) / max(part.questions - 1, 1))
    if variance < NONE:
        share = 0.5 / (part.effective + 1)
        variance = share * (1 - share) / part.effective
    return part._replace(variance=variance)


def quantile(freedom: float) -> float:
    """Return the value of Student's t that a standardised error exceeds with probability ``(1 - CONFIDENCE) / 2``."""
    return float(scipy.special.stdtrit(freedom, (1 + CONFIDENCE) / 2))


def percent(ends: Interval) -> Interval:
    """Return an interval of shares, converted to percent or points."""
    return 100 * ends[0], 100 * ends[1]
