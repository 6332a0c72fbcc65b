"""The curves of closed questions with probabilities: ROC, reliability, and risk over coverage."""

from __future__ import annotations

import numpy as np

from mslora_cr.clinical.file import Curves
from mslora_cr.metrics.calibration import reliability_bins, risk_coverage
from mslora_cr.metrics.closed import Confusion
from mslora_cr.statistics.intervals import Scores

MOST_POINTS = 101
MOST_CLASSES = 6
DIGITS = 4


def curves_of(answered: Confusion, chances: Scores) -> Curves:
    """Return the curves of the likeliest candidate, and the ROC curve of each class against the rest.

    Args:
        answered: The questions with their true classes.
        chances: (questions, classes), the probability of each class.
    """
    confidence, right = chances.max(1), (chances.argmax(1) == answered.truth).astype(np.float64)
    risks = risk_coverage(confidence, right)
    covered = np.arange(1, len(risks) + 1) / len(risks)
    counts = np.bincount(answered.truth, minlength=len(answered.names))
    binary = len(answered.names) == 2
    columns = [1] if binary else sorted(np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist())
    return Curves(
        roc={
            answered.names[column]: _roc(answered.truth == column, chances[:, column])
            for column in columns
            if 0 < counts[column] < len(answered.truth)
        },
        reliability=tuple(reliability_bins(confidence, right)),
        risk_coverage=_points(covered, risks),
    )


def _roc(positive: np.ndarray, scores: Scores) -> tuple[tuple[float, float], ...]:
    from sklearn.metrics import roc_curve

    false_rate, true_rate, _ = roc_curve(positive, scores)
    return _points(false_rate, true_rate)


def _points(across: Scores, up: Scores) -> tuple[tuple[float, float], ...]:
    """Thin a curve to at most `MOST_POINTS` points; both ends stay."""
    chosen = np.unique(np.linspace(0, len(across) - 1, MOST_POINTS).round().astype(int))
    return tuple((round(float(across[i]), DIGITS), round(float(up[i]), DIGITS)) for i in chosen)
