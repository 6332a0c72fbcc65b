"""Intervals of smooth functions of counts, from the influence of each question on the value."""

from __future__ import annotations

import numpy as np

from mslora_cr.statistics.interval import Interval
from mslora_cr.statistics.intervals import NONE, Groups, Scores, estimate, quantile


def bounded_interval(
    value: float, influence: Scores, groups: Groups, bounds: Interval, most_freedom: float
) -> Interval | None:
    """Return the interval of a value between two bounds, on the logit scale, with the variance of its influence.

    The variance is the cluster-robust one of the mean influence of a question (`estimate`). Source: Hampel, "The
    Influence Curve and its Role in Robust Estimation", JASA 1974.

    Args:
        value: The value, strictly between the bounds; otherwise there is no interval.
        influence: (questions,), with mean 0.
        groups: (questions,).
        bounds: The bounds of the value.
        most_freedom: The most degrees of freedom, such as the smallest class minus one.
    """
    largest = float(np.abs(influence).max())
    if largest < NONE:
        return None
    mean = estimate(influence / largest, groups)
    return logit_interval(value, largest * mean.variance**0.5, bounds, min(mean.freedom, most_freedom))


def logit_interval(value: float, error: float, bounds: Interval, freedom: float) -> Interval | None:
    """Return Student's t interval on the logit scale between two bounds; None at a bound, where the scale is infinite.

    Args:
        value: The measured value.
        error: Its standard error.
        bounds: The bounds of the value.
        freedom: The degrees of freedom.
    """
    low, high = bounds
    share = (value - low) / (high - low)
    if not NONE < share < 1 - NONE or freedom < 1:
        return None
    half = quantile(freedom) * error / (high - low) / (share * (1 - share))
    centre = np.log(share / (1 - share))
    ends = [low + (high - low) / (1 + np.exp(-end)) for end in (centre - half, centre + half)]
    return float(ends[0]), float(ends[1])
