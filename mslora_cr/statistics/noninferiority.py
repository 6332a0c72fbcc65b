"""One-sided tests that a paired score has not fallen by a margin, and the sample sizes that they need."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy

from mslora_cr.statistics.intervals import NONE, Groups, Scores, estimate


class NonInferiority(NamedTuple):
    """A one-sided test of H0: the mean difference is at most ``-margin``.

    Attributes:
        difference: The mean difference, a share in [-1, 1].
        bound: Its lower confidence bound at the level of the test.
        p: The p-value.
        questions: How many answers are paired.
        groups: How many of them are independent.
        gained: How many questions score higher.
        lost: How many questions score lower.
        needed: How many groups would show non-inferiority with a power of `POWER` if the difference and the spread
            stay as they are; None where no number would, since the difference is at the margin or beyond it.
    """

    difference: float
    bound: float
    p: float
    questions: int
    groups: int
    gained: int
    lost: int
    needed: int | None


POWER = 0.8
"""The power for which `NonInferiority.needed` is computed."""


def non_inferiority(differences: Scores, groups: Groups, margin: float, level: float, binary: bool) -> NonInferiority:
    """Test that scores have not fallen by a margin.

    Where scores are 0 or 1 this is Tango's score test, in which clusters enter by their effective number of questions,
    ``(s - d²) / variance`` with s the share of changed scores, and by Student's t with the degrees of freedom of the
    variance in place of the normal distribution. Elsewhere it is a t test. Source: Tango, "Equivalence Test and
    Confidence Interval for the Difference in Proportions for the Paired-Sample Design", Statistics in Medicine 1998.

    Args:
        differences: (questions,), each later score less the earlier one, in [-1, 1].
        groups: (questions,), the number of each question's cluster.
        margin: The largest loss that is tolerated, a share of at least 0.
        level: The one-sided level of the test.
        binary: Whether the scores are 0 or 1.
    """
    total = estimate(differences, groups)
    independent = total.groups == total.questions
    freedom = math.inf if independent and binary else total.freedom
    spread = total.square - total.mean**2
    if binary:
        effective = spread / total.variance if min(spread, total.variance) > NONE and not independent else total.groups
        effective = min(effective, total.questions)
        statistic = _tango_statistic(total.square, total.mean, effective, -margin)
        bound = _tango_bound(total.square, total.mean, effective, _quantile(1 - level, freedom))
    else:
        effective, error = total.groups, total.variance**0.5
        statistic = (total.mean + margin) / error if error else math.inf * np.sign(total.mean + margin)
        bound = total.mean - _quantile(1 - level, freedom) * error
    return NonInferiority(
        difference=total.mean,
        bound=max(-1.0, float(bound)),
        p=float(scipy.special.ndtr(-statistic) if math.isinf(freedom) else scipy.special.stdtr(freedom, -statistic)),
        questions=total.questions,
        groups=total.groups,
        gained=int(np.count_nonzero(differences > NONE)),
        lost=int(np.count_nonzero(differences < -NONE)),
        needed=_needed(total.square, total.mean, effective / total.groups, margin, level, binary),
    )


def sample_size(changed: float, margin: float, level: float, power: float, design_effect: float = 1.0) -> int:
    """Return how many questions show non-inferiority when nothing is lost: ``(z_level + z_power)² s / margin²``, times
    the design effect ``1 + (m - 1) ICC`` of m questions a patient. Source: Tango 1998.

    Args:
        changed: The share s of questions whose score changes, either way.
        margin: The tolerated loss, a share.
        level: The one-sided level.
        power: The wanted probability of passing.
        design_effect: By how much clusters inflate the variance.

    Raises:
        ValueError: The margin is not positive.
    """
    if margin <= 0:
        raise ValueError(f"a margin of {margin} cannot be shown by any number of questions; give one above 0")
    return math.ceil(
        (scipy.special.ndtri(1 - level) + scipy.special.ndtri(power)) ** 2 * changed / margin**2 * design_effect
    )


def spent(level: float, number: int) -> float:
    """Return the level of the `number`-th test of a stream, from 1: ``6 level / (π² number²)``.

    The levels of all numbers sum to `level`, so by Bonferroni's inequality all tests together are wrong with at most
    that probability.
    """
    return 6 * level / (math.pi * number) ** 2


def _tango_statistic(square: float, mean: float, number: float, difference: float) -> float:
    """Return the number of standard errors by which the mean lies above a difference, at the likeliest share of losses
    for it."""
    gained, lost = (square + mean) / 2, (square - mean) / 2
    linear = (2 - mean) * difference - gained - lost
    likeliest = (max(linear**2 + 8 * lost * difference * (1 - difference), 0.0) ** 0.5 - linear) / 4
    variance = max(2 * likeliest + difference * (1 - difference), 0.0) / number
    distance = mean - difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / variance**0.5


def _tango_bound(square: float, mean: float, number: float, quantile: float) -> float:
    """Return the difference above which the mean lies by `quantile` standard errors."""
    nearest = mean - NONE
    if nearest <= -1:
        return -1.0
    return float(scipy.optimize.brentq(lambda d: _tango_statistic(square, mean, number, d) - quantile, -1.0, nearest))


def _needed(square: float, mean: float, share: float, margin: float, level: float, binary: bool) -> int | None:
    """Return the groups needed for a power of `POWER`, if each is worth `share` independent questions:
    ``((z_level σ₀ + z_power σ₁) / distance)²``, with σ₀ the deviation that the test assumes at the margin, which is
    not zero even if no answer changed, and σ₁ that of the differences. Source: Nam, "Establishing Equivalence of Two
    Treatments and Sample Size Requirements in Matched-Pairs Design", Biometrics 1997.

    An observed loss is taken for the true one; an observed gain is taken for chance, unless a gain must be shown (a
    margin of 0).
    """
    likely = min(mean, 0.0) if margin else mean
    distance = margin + likely
    if distance <= NONE or share <= 0:
        return None
    deviation = max(square - mean**2, 0.0) ** 0.5
    assumed = distance / _tango_statistic(square, likely, 1.0, -margin) if binary else deviation
    return math.ceil(
        ((scipy.special.ndtri(1 - level) * assumed + scipy.special.ndtri(POWER) * deviation) / distance) ** 2 / share
    )


def _quantile(share: float, freedom: float) -> float:
    return float(scipy.special.ndtri(share) if math.isinf(freedom) else scipy.special.stdtrit(freedom, share))
