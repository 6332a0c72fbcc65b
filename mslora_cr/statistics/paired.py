"""Paired differences of scores: intervals over one task or several, losses, and the exact test of what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from mslora_cr.statistics.interval import CONFIDENCE, PairedChange
from mslora_cr.statistics.intervals import (
    NONE,
    Estimate,
    Groups,
    Scores,
    difference_interval,
    estimate,
    percent,
    quantile,
    weighted_sum,
)
from mslora_cr.statistics.significance import sign_test


class PairedTask(NamedTuple):
    """The observed differences of one task.

    Attributes:
        total: Their mean.
        losses: The share of questions whose score fell.
        binary: Whether every score was 0 or 1.
        gained: The number of questions whose score rose.
        lost: The number of questions whose score fell.
        risen: The number of clusters whose sum rose.
        fallen: The number of clusters whose sum fell.
        same: Whether one answer file stands for both sides, so that the difference is zero by construction.
    """

    total: Estimate
    losses: Estimate
    binary: bool
    gained: int
    lost: int
    risen: int
    fallen: int
    same: bool = False


def paired_task(differences: Scores, groups: Groups, binary: bool, same: bool = False) -> PairedTask:
    """Describe one task's differences.

    Args:
        differences: (questions,), at least one, of scores in [0, 1].
        groups: (questions,).
        binary: Whether every score is 0 or 1.
        same: Whether one answer file stands for both sides.
    """
    sums = np.bincount(groups, differences)
    return PairedTask(
        total=estimate(differences, groups),
        losses=estimate((differences < -NONE).astype(np.float64), groups),
        binary=binary,
        gained=int((differences > NONE).sum()),
        lost=int((differences < -NONE).sum()),
        risen=int((sums > NONE).sum()),
        fallen=int((sums < -NONE).sum()),
        same=same,
    )


def paired_change(tasks: Sequence[PairedTask], weights: Sequence[float] = (1.0,)) -> PairedChange:
    """Return the weighted sum of tasks' differences.

    The interval is MOVER's, from each task's own limits l and u about its difference d, ``Σ w d - √Σ w² (d - l)²`` and
    ``Σ w d + √Σ w² (u - d)²``: a task in which nothing changed keeps the width of its own interval, whereas a sum of
    variances would take it for certain. The bound of losses is Clopper and Pearson's over all questions, with Korn and
    Graubard's effective number if they share images. The test is McNemar's exact one; if questions share images, each
    image counts once, by the sign of its sum. Sources: Zou and Donner, "Construction of Confidence Limits about Effect
    Measures: A General Approach", Statistics in Medicine 2008; Clopper and Pearson, "The Use of Confidence or Fiducial
    Limits Illustrated in the Case of the Binomial", Biometrika 1934; McNemar, "Note on the Sampling Error of the
    Difference between Correlated Proportions or Percentages", Psychometrika 1947.

    Args:
        tasks: At least one.
    """
    seen = [task for task in tasks if not task.same]
    questions = sum(task.total.questions for task in tasks)
    if not seen:
        return PairedChange((0.0, 0.0), 0, 0, questions, 0.0, 1.0, None, None)
    own_weights = [weight for task, weight in zip(tasks, weights, strict=True) if not task.same]
    total = weighted_sum([task.total for task in seen], own_weights)
    mean, low, high = total.mean, 0.0, 0.0
    for task, weight in zip(seen, own_weights, strict=True):
        ends = difference_interval(task.total, task.binary)
        low += (weight * (task.total.mean - ends[0])) ** 2
        high += (weight * (ends[1] - task.total.mean)) ** 2
    shares = [task.losses.questions / questions for task in seen]
    return PairedChange(
        ends=percent((max(-1.0, mean - low**0.5), min(1.0, mean + high**0.5))),
        gained=sum(task.gained for task in seen),
        lost=sum(task.lost for task in seen),
        questions=questions,
        most_lost=100 * upper_bound(weighted_sum([task.losses for task in seen], shares)),
        p=sign_test(sum(task.risen for task in seen), sum(task.fallen for task in seen)),
        freedom=total.freedom,
        largest=total.largest,
    )


def upper_bound(share: Estimate, confidence: float = CONFIDENCE) -> float:
    """Return Clopper and Pearson's one-sided upper bound of a share, with Korn and Graubard's effective number of
    questions if these share clusters.
    """
    number = float(share.questions)
    if share.groups < share.questions:
        number = share.effective
        if share.variance > NONE and 0 < share.mean < 1:
            alone = share.mean * (1 - share.mean) / (share.questions - 1)
            ratio = quantile(share.questions - 1.0) / quantile(share.freedom)
            number = share.questions / max(1.0, share.variance / alone) * min(1.0, ratio) ** 2
    if share.mean >= 1:
        return 1.0
    return float(scipy.special.betaincinv(share.mean * number + 1, number * (1 - share.mean), confidence))
