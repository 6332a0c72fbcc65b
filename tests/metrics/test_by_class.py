"""Balanced accuracy and AUROC as means over questions, against scikit-learn and the clustered variance."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from mslora_cr.metrics.by_class import area_scores, balanced_scores
from mslora_cr.metrics.discrimination import obuchowski_error
from mslora_cr.statistics.intervals import estimate

TRUTH = np.array([1] * 8 + [0] * 12)
YES = np.array(
    [0.95, 0.9, 0.85, 0.8, 0.7, 0.55, 0.4, 0.3, 0.75, 0.6, 0.45, 0.35, 0.35, 0.25, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05]
)


def test_means_over_questions_are_the_figures() -> None:
    said = (YES > 0.5).astype(int)
    balanced = balanced_scores(TRUTH, (said == TRUTH).astype(float))
    assert balanced.mean() == pytest.approx(balanced_accuracy_score(TRUTH, said)) == pytest.approx(0.79167, abs=1e-5)
    areas = area_scores(TRUTH, np.stack([1 - YES, YES], axis=1))
    assert areas is not None and areas.mean() == pytest.approx(roc_auc_score(TRUTH, YES)) == pytest.approx(0.885417)
    random = np.random.default_rng(1)
    chances, truth = random.dirichlet([1, 1, 1], size=60), np.arange(60) % 3
    areas = area_scores(truth, chances)
    assert areas is not None and areas.mean() == pytest.approx(roc_auc_score(truth, chances, multi_class="ovr"))
    assert area_scores(np.zeros(4, dtype=int), np.full((4, 2), 0.5)) is None


def test_the_spread_of_pseudo_values_is_the_variance_of_clustered_areas() -> None:
    random = np.random.default_rng(3)
    groups = np.arange(800) // 4
    truth = (random.random(800) < 0.3).astype(int)
    yes = 0.5 * truth + random.normal(size=800) + 0.5 * random.normal(size=200)[groups]
    areas = area_scores(truth, np.stack([-yes, yes], axis=1))
    assert areas is not None
    error = estimate(areas, groups).variance ** 0.5
    assert error == pytest.approx(obuchowski_error(truth == 1, yes, groups), rel=0.01)
