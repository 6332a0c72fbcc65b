"""Calibration of probabilities, and what abstaining costs and saves. Pure functions of arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from mslora_cr.metrics.measured import ReliabilityPoint

Floats = NDArray[np.float64]

BINS = 10


class BrierParts(NamedTuple):
    """``score = reliability - resolution + uncertainty``."""

    score: float
    reliability: float
    resolution: float
    uncertainty: float


def brier_decomposition(probabilities: Floats, outcomes: Floats) -> BrierParts:
    """Return the Brier score and its parts over the distinct forecasts.

    Source: Murphy, "A new vector partition of the probability score", Journal of Applied Meteorology 1973.

    Args:
        probabilities: (questions,), the probability of the outcome 1.
        outcomes: (questions,), 0 or 1.
    """
    _, forecast = np.unique(probabilities, return_inverse=True)
    counts = np.bincount(forecast)
    means = np.bincount(forecast, outcomes) / counts
    issued = np.bincount(forecast, probabilities) / counts
    base, weights = outcomes.mean(), counts / len(outcomes)
    return BrierParts(
        score=float(np.mean((probabilities - outcomes) ** 2)),
        reliability=float(weights @ (issued - means) ** 2),
        resolution=float(weights @ (means - base) ** 2),
        uncertainty=float(base * (1 - base)),
    )


def reliability_bins(confidence: Floats, right: Floats, bins: int = BINS) -> list[ReliabilityPoint]:
    """Return bins of equal mass, in the order of confidence; ties keep the questions' order.

    Args:
        confidence: (questions,), the probability of the given answer.
        right: (questions,), 1 where that answer is right, else 0.
        bins: Number of bins. No bin is empty, so fewer questions have fewer bins.
    """
    return [
        ReliabilityPoint(
            confidence=float(confidence[part].mean()), accuracy=float(right[part].mean()), questions=len(part)
        )
        for part in _of_equal_mass(confidence, bins)
    ]


def _of_equal_mass(confidence: Floats, bins: int) -> list[NDArray[np.intp]]:
    """Return the questions of each bin of `reliability_bins`."""
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]


def expected_calibration_error(confidence: Floats, right: Floats, bins: int = BINS) -> float:
    """Return ``Σ_b n_b/n |accuracy_b - confidence_b|`` over bins of equal mass.

    Source: Nguyen and O'Connor, "Posterior calibration and exploratory analysis for natural language processing
    models", EMNLP 2015. The arguments are those of `reliability_bins`.
    """
    return float(calibration_scores(confidence, right, bins).mean())


def calibration_scores(confidence: Floats, right: Floats, bins: int = BINS) -> Floats:
    """Return each question's part in the expected calibration error, (questions,), whose mean is that error: right
    minus confidence, with the sign that this difference has on average in the question's bin.

    The arguments are those of `reliability_bins`.
    """
    off = right - confidence
    for part in _of_equal_mass(confidence, bins):
        off[part] *= np.sign(off[part].mean())
    return off


def risk_coverage(confidence: Floats, right: Floats) -> Floats:
    """Return the share of wrong answers among the k surest, for k = 1, …, n; ties keep the questions' order.

    Source: El-Yaniv and Wiener, "On the foundations of noise-free selective classification", JMLR 2010. The arguments
    are those of `reliability_bins`. The mean of the result is the area under the curve.
    """
    order = np.argsort(-confidence, kind="stable")
    return np.cumsum(1 - right[order]) / np.arange(1, len(right) + 1)


def risk_coverage_scores(confidence: Floats, right: Floats) -> Floats:
    """Return each question's pseudo-value of the area under the risk–coverage curve, (questions,), whose mean is the
    area.

    With r_k the risk among the k surest, the question at place i moves the area by ``r_i - area`` as a threshold, and
    by ``Σ_{k >= i} (wrong_i - r_k) / k`` as an answer above the thresholds after it. The arguments are those of
    `reliability_bins`.
    """
    order, risks = np.argsort(-confidence, kind="stable"), risk_coverage(confidence, right)
    places = np.arange(1, len(risks) + 1)
    behind, risk_behind = (np.cumsum(values[::-1])[::-1] for values in (1 / places, risks / places))
    scores = np.empty(len(risks))
    scores[order] = risks + (1 - right[order]) * behind - risk_behind
    return scores


def _answered_at(coverage: float, questions: int) -> int:
    """Return ``ceil(coverage · n)``, at least 1."""
    return max(1, math.ceil(round(coverage * questions, 9)))


def accuracy_at_coverage(confidence: Floats, right: Floats, coverage: float) -> float:
    """Return the share of right answers among the surest ``ceil(coverage · n)``. The arguments are those of
    `reliability_bins`."""
    answered = _answered_at(coverage, len(right))
    return float(1 - risk_coverage(confidence, right)[answered - 1])


def accuracy_at_coverage_scores(confidence: Floats, right: Floats, coverage: float) -> Floats:
    """Return each question's pseudo-value of `accuracy_at_coverage`, (questions,), whose mean is that accuracy.

    A question among the surest counts as right or wrong, and moves the threshold past questions that are right as often
    as the ``√n`` next to it on either side.
    """
    count, order = len(right), np.argsort(-confidence, kind="stable")
    answered, near = _answered_at(coverage, count), math.ceil(count**0.5)
    at_threshold = right[order[max(0, answered - near) : answered + near]].mean()
    scores = np.full(count, at_threshold)
    scores[order[:answered]] += count / answered * (right[order[:answered]] - at_threshold)
    return scores


def risk_threshold(confidence: Floats, right: Floats, risk: float) -> float | None:
    """Return the least confidence from which to answer, so that at most a share `risk` of all questions is answered
    wrongly.

    Conformal risk control takes the least t with ``n/(n+1) · R(t) + 1/(n+1) <= risk``, where R(t) is the share of the n
    questions that are wrong with confidence t or more. The guarantee holds in expectation, for a question that is
    exchangeable with these. Source: Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal risk control", ICLR 2024.

    Args:
        confidence: (questions,), of validation questions, one of each patient, on which nothing was fitted.
        right: (questions,), 1 where the answer is right, else 0.
        risk: The wanted bound, between 0 and 1.

    Returns:
        The threshold; infinity where nothing may be answered; None where there are too few questions for such a bound.
    """
    count = len(right)
    if 1 / (count + 1) > risk:
        return None
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(1 - right[order])
    allowed = (wrong + 1) / (count + 1) <= risk + 1e-12
    sure = confidence[order]
    # A threshold takes either all questions of one confidence or none of them.
    last = np.append(sure[1:] != sure[:-1], True)
    thresholds = sure[allowed & last]
    return float(thresholds.min()) if len(thresholds) else math.inf


def fitted_temperature(scores: list[Floats], truths: list[int]) -> float:
    """Return the T > 0 that minimises the log loss of ``softmax(scores / T)``; 1 changes nothing.

    Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017.

    Args:
        scores: The candidates' log-likelihoods, by validation question.
        truths: The place of the right candidate, by validation question.
    """

    def loss(log_temperature: float) -> float:
        scaled = [score / math.exp(log_temperature) for score in scores]
        return float(
            np.mean([np.logaddexp.reduce(score) - score[truth] for score, truth in zip(scaled, truths, strict=True)])
        )

    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x)
