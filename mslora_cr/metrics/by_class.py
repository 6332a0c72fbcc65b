"""Figures of closed questions as means over questions, so that two models' can be compared question by question.

A share of a class, such as sensitivity, is the mean of the questions in it. Any other figure becomes the mean of
pseudo-values: the figure plus the influence of each question on it. Source: Hampel, "The Influence Curve and its Role
in Robust Estimation", JASA 1974.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mslora_cr.metrics.calibration import accuracy_at_coverage_scores, calibration_scores, risk_coverage_scores
from mslora_cr.metrics.closed import Classes, Confusion, confusion_figures, influences
from mslora_cr.metrics.discrimination import average_precision, placements
from mslora_cr.metrics.measured import Measured
from mslora_cr.statistics.intervals import Scores
from mslora_cr.statistics.linearised import bounded_interval
from mslora_cr.statistics.matrix_intervals import Column
from mslora_cr.statistics.sample_size import FEWEST, FEWEST_SHARED

BALANCED, MACRO_F1, MATTHEWS = "balanced accuracy", "macro F1", "Matthews' correlation"
SENSITIVITY, SPECIFICITY, PPV, NPV = "sensitivity", "specificity", "PPV", "NPV"
AUROC, AVERAGE_PRECISION = "AUROC", "average precision"
BRIER = "Brier score"
CALIBRATION_ERROR, RISK_COVERAGE = "calibration error", "area under risk over coverage"
AT_COVERAGE = {f"accuracy of the surest {coverage:.0%}": coverage for coverage in (0.8, 0.9)}
RECALL, PRECISION = "recall by class", "precision by class"
BY_CLASS = (
    BALANCED,
    MACRO_F1,
    MATTHEWS,
    SENSITIVITY,
    SPECIFICITY,
    PPV,
    NPV,
    AUROC,
    AVERAGE_PRECISION,
    BRIER,
    CALIBRATION_ERROR,
    RISK_COVERAGE,
    *AT_COVERAGE,
    RECALL,
    PRECISION,
)
"""Figures that a comparison tests; of the last two, each class has a column `TITLE: CLASS`."""
PSEUDO = {
    *(MACRO_F1, MATTHEWS, PPV, NPV, AUROC, AVERAGE_PRECISION, CALIBRATION_ERROR, RISK_COVERAGE, PRECISION),
    *AT_COVERAGE,
}
"""Figures of pseudo-values, which nearly every question moves: to count those that changed says nothing."""


def class_columns(table: Confusion, chances: Scores | None) -> dict[str, Column]:
    """Return the figures of `BY_CLASS` that closed questions have; none for questions of a single class.

    Figures that rest on a class with fewer than `FEWEST` questions are left out. Where questions share fewer than
    `FEWEST_SHARED` images, only means over all of them are left: intervals of the others would not cover as often as
    they say.

    Args:
        table: The true class of each question and the one that was said.
        chances: (questions, classes), the probability of each class; None if it is unknown.
    """
    counts = np.bincount(table.truth, minlength=len(table.names))
    enough = [index for index in range(len(table.names)) if counts[index] >= FEWEST]
    each = {} if table.has_positive else _with_enough_images(_of_each(table, enough), table)
    if np.count_nonzero(counts) < 2 or len(enough) < np.count_nonzero(counts):
        return each if np.count_nonzero(counts) > 1 else {}
    values = confusion_figures(table)
    columns = {
        BALANCED: balanced_scores(table.truth, table.right),
        **{name: values[name].value + influences(table, name) for name in (MACRO_F1, MATTHEWS)},
    }
    if chances is not None:
        by_title = {AUROC: area_scores(table.truth, chances), AVERAGE_PRECISION: precision_scores(table.truth, chances)}
        columns |= {title: scores for title, scores in by_title.items() if scores is not None}
        columns[BRIER] = brier_scores(table.truth, chances)
        columns |= confidence_scores(table.truth, chances)
    whole = {title: Column(scores, table.groups) for title, scores in columns.items()}
    return _with_enough_images(whole | (_of_two(table) if table.has_positive else each), table)


def _with_enough_images(columns: dict[str, Column], table: Confusion) -> dict[str, Column]:
    images = len(np.unique(table.groups))
    if images == len(table.truth) or images >= FEWEST_SHARED:
        return columns
    return {title: column for title, column in columns.items() if title.partition(":")[0] in (BALANCED, BRIER)}


def _of_two(table: Confusion) -> dict[str, Column]:
    recalls = {SENSITIVITY: _recall(table, 1), SPECIFICITY: _recall(table, 0)}
    precisions = {PPV: _precision(table, 1), NPV: _precision(table, 0)}
    return recalls | {name: column for name, column in precisions.items() if column is not None}


def _of_each(table: Confusion, classes: Sequence[int]) -> dict[str, Column]:
    """Recall and precision of each class."""
    columns = {}
    for index in classes:
        columns[f"{RECALL}: {table.names[index]}"] = _recall(table, index)
        if (precision := _precision(table, index)) is not None:
            columns[f"{PRECISION}: {table.names[index]}"] = precision
    return columns


def _recall(table: Confusion, index: int) -> Column:
    where = table.truth == index
    return Column(table.right[where], np.unique(table.groups[where], return_inverse=True)[1])


def _precision(table: Confusion, index: int) -> Column | None:
    """Return the share of answers of a class that is right, as pseudo-values of a ratio over all questions; None if no
    answer says the class."""
    said = (table.said == index).astype(np.float64)
    if not said.any():
        return None
    value = float(table.right[said > 0].mean())
    return Column(value + said * (table.right - value) / said.mean(), table.groups)


def balanced_scores(truth: Classes, right: Scores) -> Scores:
    """Return each question's part in balanced accuracy; their mean over questions is the mean recall of the classes.

    Two models' parts differ by ``n / (K n_c)`` where one is right and the other is not, with n_c of n questions in the
    question's class and K classes. So paired tests of the mean hold as they stand.

    Args:
        truth: (questions,), the place of the true class.
        right: (questions,), 1 where the true class was said, else 0.
    """
    classes, indices, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return right * len(truth) / (len(classes) * counts[indices])


def brier_scores(truth: Classes, chances: Scores) -> Scores:
    """Return each question's ``½ Σ_k (p_k - y_k)²``, in [0, 1]; of two classes it is ``(p - y)²`` of either.

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 1950.

    Args:
        truth: (questions,), the place of the true class.
        chances: (questions, classes), the probability of each class.
    """
    return np.square(chances - np.eye(chances.shape[1])[truth]).sum(axis=1) / 2


def confidence_scores(truth: Classes, chances: Scores) -> dict[str, Scores]:
    """Return each question's pseudo-value of the figures of the likeliest class's probability, by title.

    Args:
        truth: (questions,), the place of the true class.
        chances: (questions, classes), the probability of each class.
    """
    confidence, right = chances.max(1), (chances.argmax(1) == truth).astype(np.float64)
    return {
        CALIBRATION_ERROR: calibration_scores(confidence, right),
        RISK_COVERAGE: risk_coverage_scores(confidence, right),
        **{title: accuracy_at_coverage_scores(confidence, right, share) for title, share in AT_COVERAGE.items()},
    }


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
    return _macro(truth, chances, _areas)


def precision_scores(truth: Classes, chances: Scores) -> Scores | None:
    """Return each question's pseudo-value of the average precision, as `area_scores` does of the area."""
    return _macro(truth, chances, _precisions)


def macro_areas(table: Confusion, chances: Scores) -> dict[str, Measured]:
    """Return the mean over classes, each against the rest, of the area under the ROC curve, with an interval by
    linearisation (`bounded_interval`), and of average precision; intervals need `FEWEST` questions of every class.

    Args:
        table: The true class of each question.
        chances: (questions, classes), the probability of each class; more than two classes.
    """
    present, counts = np.unique(table.truth, return_counts=True)
    scores = area_scores(table.truth, chances)
    if scores is None:
        return {}
    value, fewest = float(scores.mean()), int(counts.min())
    ends = bounded_interval(value, scores - value, table.groups, (0.0, 1.0), fewest - 1)
    return {
        f"macro {AUROC}": Measured(value=value, interval=ends if fewest >= FEWEST else None),
        f"macro {AVERAGE_PRECISION}": average_precision(
            table.truth[:, None] == present, chances[:, present], table.groups
        ),
    }


def _macro(
    truth: Classes, chances: Scores, pseudo_values: Callable[[NDArray[np.bool_], Scores], Scores]
) -> Scores | None:
    present = np.unique(truth)
    if len(present) < 2:
        return None
    columns = present[-1:] if chances.shape[1] == 2 else present
    return np.mean([pseudo_values(truth == column, chances[:, column]) for column in columns], axis=0)


def _areas(positive: NDArray[np.bool_], scores: Scores) -> Scores:
    placed = placements(positive, scores)
    area = placed[positive].mean()
    weights = np.where(positive, len(positive) / positive.sum(), len(positive) / (~positive).sum())
    return area + weights * (placed - area)


def _precisions(positive: NDArray[np.bool_], scores: Scores) -> Scores:
    """With P the precision and N the number of answers from a score on, and m positive questions, the average precision
    is the mean of P over positive questions. Question j moves it by ``y_j (P_j - AP)/m + Σ (y_j - P_i)/(m N_i)``, where
    the sum is over the positive questions i that do not score higher."""
    levels, level_of = np.unique(-scores, return_inverse=True)
    positives = np.bincount(level_of, positive, len(levels))
    answers = np.cumsum(np.bincount(level_of, minlength=len(levels)))
    precision, count = np.cumsum(positives) / answers, positives.sum()
    value = float((positives * precision).sum() / count)
    behind = np.cumsum((positives / answers)[::-1])[::-1], np.cumsum((positives * precision / answers)[::-1])[::-1]
    at_itself = positive * (precision[level_of] - value)
    return value + len(scores) / count * (at_itself + positive * behind[0][level_of] - behind[1][level_of])
