"""Balanced accuracy and AUROC as means over questions, so that two models' can be compared question by question."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mslora_cr.metrics.discrimination import placements
from mslora_cr.statistics.intervals import Scores

Classes = NDArray[np.int64]


def balanced_scores(truth: Classes, right: Scores) -> Scores:
    """Return each question's part in balanced accuracy; their mean over questions is the mean recall of the classes.

    Two models' parts differ by ``n / (K n_c)`` where one is right and the other is not, with n_c of n questions in the
    question's class and K classes. So paired tests of the mean hold as they stand.

    Args:
        truth: (questions,), the place of the true class.
        right: (questions,), 1 where the true class was said, else 0.
    """
    classes, place, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return right * len(truth) / (len(classes) * counts[place])


def area_scores(truth: Classes, chances: Scores) -> Scores | None:
    """Return each question's pseudo-value of the area under the ROC curve: their mean is the area, and their spread is
    its variance (DeLong's). With more than two classes it is the mean area of each class against the rest; None where
    all questions are of one class.

    The pseudo-value is ``θ + n/m (V10 - θ)`` for each of m positive questions and ``θ + n/(n-m) (V01 - θ)`` for each
    negative one. V10 and V01 are the shares of the other kind on whose right side the question stands. Source: DeLong,
    DeLong and Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating Characteristic
    Curves", Biometrics 1988.

    Args:
        truth: (questions,), the place of the true class.
        chances: (questions, classes), the probability of each class.
    """
    present = np.unique(truth)
    if len(present) < 2:
        return None
    columns = present[-1:] if chances.shape[1] == 2 else present
    return np.mean([_pseudo_values(truth == column, chances[:, column]) for column in columns], axis=0)


def _pseudo_values(positive: NDArray[np.bool_], scores: Scores) -> Scores:
    placed = placements(positive, scores)
    area = placed[positive].mean()
    weights = np.where(positive, len(positive) / positive.sum(), len(positive) / (~positive).sum())
    return area + weights * (placed - area)
