"""Calibration and abstention: worked by hand, against scikit-learn, and the guarantee by simulation."""

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from mslora_cr.metrics.calibration import (
    accuracy_at_coverage,
    accuracy_at_coverage_scores,
    brier_decomposition,
    expected_calibration_error,
    fitted_temperature,
    reliability_bins,
    risk_coverage,
    risk_coverage_scores,
    risk_threshold,
)

TRUTH = np.array([1] * 8 + [0] * 12, dtype=np.float64)
YES = np.array(
    [0.95, 0.9, 0.85, 0.8, 0.7, 0.55, 0.4, 0.3, 0.75, 0.6, 0.45, 0.35, 0.35, 0.25, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05]
)
CONFIDENCE = np.maximum(YES, 1 - YES)
RIGHT = ((YES >= 0.5) == (TRUTH == 1)).astype(np.float64)


def test_the_brier_score_and_its_parts() -> None:
    parts = brier_decomposition(YES, TRUTH)
    assert parts.score == pytest.approx(brier_score_loss(TRUTH, YES)) == pytest.approx(0.136875)
    assert parts[1:] == pytest.approx((0.136875, 0.24, 0.24))
    assert parts.score == pytest.approx(parts.reliability - parts.resolution + parts.uncertainty)


def test_bins_of_equal_mass() -> None:
    assert expected_calibration_error(CONFIDENCE, RIGHT, bins=5) == pytest.approx(0.0725)
    bins = reliability_bins(CONFIDENCE, RIGHT, bins=5)
    assert [part.questions for part in bins] == [4] * 5 and bins[-1].accuracy == 1
    assert len(reliability_bins(CONFIDENCE[:3], RIGHT[:3])) == 3


def test_risk_and_coverage() -> None:
    assert risk_coverage(CONFIDENCE, RIGHT).mean() == pytest.approx(0.073079, abs=1e-6)
    assert accuracy_at_coverage(CONFIDENCE, RIGHT, 0.8) == pytest.approx(0.875)
    assert accuracy_at_coverage(CONFIDENCE, RIGHT, 0.9) == pytest.approx(7 / 9)
    assert accuracy_at_coverage(CONFIDENCE, RIGHT, 1) == pytest.approx(0.8)
    assert risk_coverage_scores(CONFIDENCE, RIGHT).mean() == pytest.approx(0.073079, abs=1e-6)
    # 16 are among the surest; the threshold lies between the 5 before and the 4 after it.
    scores = accuracy_at_coverage_scores(CONFIDENCE, RIGHT, 0.8)
    order = np.argsort(-CONFIDENCE, kind="stable")
    near = RIGHT[order[11:]].mean()
    assert scores.mean() == pytest.approx(0.875)
    assert scores[order[[0, 19]]] == pytest.approx([near + (1 - near) / 0.8, near])


def test_a_threshold_worked_by_hand() -> None:
    confidence, right = np.array([0.9, 0.8, 0.8, 0.6, 0.5]), np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    assert risk_threshold(confidence, right, 0.2) == 0.9  # 1/6; from 0.8 on it is 2/6
    assert risk_threshold(confidence, right, 0.35) == 0.6
    assert risk_threshold(confidence, right, 0.5) == 0.5
    assert risk_threshold(confidence, right, 0.1) is None  # five questions promise nothing below 1/6
    assert risk_threshold(confidence, np.zeros(5), 0.2) == math.inf


@pytest.mark.parametrize("risk", [0.05, 0.1])
def test_the_promised_risk_is_kept(risk: float) -> None:
    """600 calibrations of 100 questions: the mean share of questions answered wrongly stays below the bound."""
    random = np.random.default_rng(0)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        confidence = random.uniform(0.4, 1, count)
        return confidence, (random.uniform(size=count) < confidence**2).astype(np.float64)

    losses = []
    for _ in range(600):
        threshold = risk_threshold(*drawn(100), risk)
        assert threshold is not None
        confidence, right = drawn(200)
        losses.append(np.mean((confidence >= threshold) & (right == 0)))
    error = np.std(losses) / math.sqrt(len(losses))
    assert risk - 0.02 < np.mean(losses) < risk + 2 * error


def test_a_temperature_undoes_another() -> None:
    random = np.random.default_rng(1)
    scores = [random.normal(size=3) * 2 for _ in range(4000)]
    truths = [int(random.choice(3, p=np.exp(s) / np.exp(s).sum())) for s in scores]
    assert fitted_temperature([2.5 * score for score in scores], truths) == pytest.approx(2.5, rel=0.1)
