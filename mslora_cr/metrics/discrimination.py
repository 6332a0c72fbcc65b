"""How well probabilities tell classes apart: AUROC and average precision, one class against the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mslora_cr.metrics.measured import Measured
from mslora_cr.statistics.intervals import Groups, Scores
from mslora_cr.statistics.linearised import logit_interval
from mslora_cr.statistics.sample_size import FEWEST

PARTS = 50
"""A jackknife has at most this many parts."""


def auroc(positive: NDArray[np.bool_], scores: Scores, groups: Groups) -> Measured:
    """Return the area under the ROC curve, with Obuchowski's variance of clustered data on the logit scale.

    Where every question is a cluster of its own, this is DeLong's variance. Sources: Obuchowski, "Nonparametric
    Analysis of Clustered ROC Curve Data", Biometrics 1997; DeLong et al., Biometrics 1988.

    Args:
        positive: (questions,), whether the class is true; both cases must occur.
        scores: (questions,), higher where positive is likelier.
        groups: (questions,), the number of each question's cluster.
    """
    from sklearn.metrics import roc_auc_score

    value = float(roc_auc_score(positive, scores))
    fewest = min(int(positive.sum()), int((~positive).sum()))
    clusters = min(len(np.unique(groups[positive])), len(np.unique(groups[~positive])))
    if fewest < FEWEST or clusters < 2:
        return Measured(value=value, interval=None)
    error = obuchowski_error(positive, scores, groups)
    return Measured(value=value, interval=logit_interval(value, error, (0.0, 1.0), clusters - 1))


def obuchowski_error(positive: NDArray[np.bool_], scores: Scores, groups: Groups) -> float:
    """Return the standard error of an area under the ROC curve: ``S10/m + S01/n + 2 S11/(m n)``, where S are sums over
    clusters of what their m positive and n negative questions contribute."""
    placed = placements(positive, scores)
    yes, no = scores[positive], scores[~positive]
    below, above = placed[positive], placed[~positive]
    value = below.mean()
    size = int(groups.max()) + 1
    of_yes = np.bincount(groups[positive], below - value, size)
    of_no = np.bincount(groups[~positive], above - value, size)
    with_yes, with_no = len(np.unique(groups[positive])), len(np.unique(groups[~positive]))
    clusters = len(np.unique(groups))
    yes_spread = with_yes / ((with_yes - 1) * len(yes)) * np.square(of_yes).sum()
    no_spread = with_no / ((with_no - 1) * len(no)) * np.square(of_no).sum()
    shared = clusters / (clusters - 1) * (of_yes * of_no).sum()
    variance = yes_spread / len(yes) + no_spread / len(no) + 2 * shared / (len(yes) * len(no))
    return float(max(variance, 0.0) ** 0.5)


def placements(positive: NDArray[np.bool_], scores: Scores) -> Scores:
    """Return the share of the other kind on whose right side each question stands, (questions,); a tie counts half. The
    mean over the questions of either kind is the area under the ROC curve."""
    placed = np.empty(len(scores))
    placed[positive] = _beaten(scores[positive], scores[~positive])
    placed[~positive] = 1 - _beaten(scores[~positive], scores[positive])
    return placed


def _beaten(ours: Scores, theirs: Scores) -> Scores:
    """Return the share of their scores that each of ours exceeds; a tie counts half."""
    ranked = np.sort(theirs)
    return (np.searchsorted(ranked, ours, "left") + np.searchsorted(ranked, ours, "right")) / (2 * len(ranked))


def average_precision(positive: NDArray[np.bool_], scores: Scores, groups: Groups) -> Measured:
    """Return the area under the precision–recall curve, or its mean over several classes, each against the rest, with a
    delete-a-group jackknife over clusters on the logit scale.

    Source: Kott, "The Delete-a-Group Jackknife", Journal of Official Statistics 2001.

    Args:
        positive: (questions,) or (questions, classes), whether the class is true; it must be for at least one question.
        scores: The same shape, higher where positive is likelier.
        groups: (questions,), the number of each question's cluster.
    """
    from sklearn.metrics import average_precision_score

    by_class = list(zip(np.atleast_2d(positive.T), np.atleast_2d(scores.T), strict=True))
    value = float(np.mean([average_precision_score(true, score) for true, score in by_class]))
    clusters = np.unique(groups, return_inverse=True)[1]
    count = int(clusters.max()) + 1
    parts = min(PARTS, count)
    with_yes = min(len(np.unique(groups[true])) for true, _ in by_class)
    if min(min(int(true.sum()), int((~true).sum())) for true, _ in by_class) < FEWEST or with_yes < 2:
        return Measured(value=value, interval=None)
    part = (np.random.default_rng(0).permutation(count) % parts)[clusters]
    rests = [part != number for number in range(parts)]
    if not all(true[rest].any() for rest in rests for true, _ in by_class):
        return Measured(value=value, interval=None)
    levels = [(true, np.unique(-score, return_inverse=True)[1]) for true, score in by_class]
    without = np.array(
        [np.mean([_average_precision(true[rest], level_of[rest]) for true, level_of in levels]) for rest in rests]
    )
    error = float(((parts - 1) / parts * np.square(without - without.mean()).sum()) ** 0.5)
    return Measured(value=value, interval=logit_interval(value, error, (0.0, 1.0), min(parts, with_yes) - 1))


def _average_precision(positive: NDArray[np.bool_], level_of: NDArray[np.int64]) -> float:
    """As scikit-learn's, which takes a hundred times as long, by the place of each question's score from the highest
    down."""
    answers, positives = np.cumsum(np.bincount(level_of)), np.bincount(level_of, positive)
    return float((positives / np.maximum(answers, 1) * np.cumsum(positives)).sum() / positives.sum())
