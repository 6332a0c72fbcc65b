"""Figures of closed questions as means over questions, against scikit-learn and the clustered variance."""

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    roc_auc_score,
)

from mslora_cr.metrics.by_class import area_scores, balanced_scores, class_columns, macro_areas, precision_scores
from mslora_cr.metrics.closed import Confusion, confusion, confusion_figures
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


def test_means_of_areas_over_classes_have_intervals_where_each_class_has_enough_questions() -> None:
    random = np.random.default_rng(2)
    truth = np.arange(60) % 3
    chances = random.dirichlet([1, 1, 1], size=60) + 0.3 * np.eye(3)[truth]
    chances /= chances.sum(axis=1, keepdims=True)
    known = macro_areas(Confusion(("a", "b", "c"), truth, truth, np.arange(60)), chances)
    area, precision = known["macro AUROC"], known["macro average precision"]
    assert area.value == pytest.approx(roc_auc_score(truth, chances, multi_class="ovr"))
    assert precision.value == pytest.approx(average_precision_score(np.eye(3)[truth], chances, average="macro"))
    for figure in (area, precision):
        assert figure.interval is not None and 0.5 < figure.interval[0] < figure.value < figure.interval[1] < 1
    few = macro_areas(Confusion(("a", "b", "c"), truth[:42], truth[:42], np.arange(42)), chances[:42])
    assert {figure.interval for figure in few.values()} == {None}, "fourteen questions of a class"


def test_every_figure_of_two_classes_is_the_mean_of_its_column() -> None:
    truth, chances = np.tile(TRUTH, 2), np.tile(YES, 2)
    answers = ["yes" if chance > 0.5 else "no" for chance in chances]
    answers[-1] = "perhaps"
    truths = [["yes"] if true else ["no"] for true in truth]
    table = confusion(answers, truths, np.arange(40) // 2)
    columns = class_columns(table, np.stack([1 - chances, chances], axis=1))
    for name, figure in confusion_figures(table).items():
        if name != "accuracy":
            assert columns[name].scores.mean() == pytest.approx(figure.value, abs=1e-6), name
    assert columns["Brier score"].scores.mean() == pytest.approx(0.136875)
    assert columns["average precision"].scores.mean() == pytest.approx(average_precision_score(TRUTH, YES))
    assert [len(columns[name].scores) for name in ("sensitivity", "specificity", "PPV")] == [16, 24, 40]
    # A model that never says yes has no PPV to compare; one class alone has no figure.
    never = confusion(["no"] * 40, truths, np.arange(40))
    assert "PPV" not in class_columns(never, None) and class_columns(never, None)["NPV"].scores.mean() == 0.6
    assert class_columns(confusion(["yes"] * 40, [["yes"]] * 40, np.arange(40)), None) == {}
    shared = confusion(answers, truths, np.arange(40) // 4)
    assert set(class_columns(shared, None)) == {"balanced accuracy"}, "of ten images"
    few = confusion(answers[:20], truths[:20], np.arange(20))
    assert class_columns(few, None) == {}, "eight questions of a class give no interval that holds"


def test_a_pseudo_value_is_what_a_question_weighs_in_the_figure() -> None:
    """The figure minus its change where one question weighs a little more, from scikit-learn with weights."""
    random = np.random.default_rng(2)
    truth, said = random.integers(3, size=60), random.integers(3, size=60)
    chances = random.integers(1, 5, size=(60, 3)) / 8  # with ties
    names = np.array(["a", "b", "c"])
    table = confusion(list(names[said]), [[name] for name in names[truth]], np.arange(60))
    columns = {title: column.scores for title, column in class_columns(table, chances).items()}

    def average(weights: np.ndarray) -> float:
        of = [average_precision_score(truth == c, chances[:, c], sample_weight=weights) for c in range(3)]
        return float(np.mean(of))

    order, right = np.argsort(-chances.max(1), kind="stable"), (chances.argmax(1) == truth).astype(float)

    def risk_area(weights: np.ndarray) -> float:
        ordered = weights[order]
        risks = np.cumsum(ordered * (1 - right[order])) / np.cumsum(ordered)
        return float(np.average(risks, weights=ordered))

    def calibration_error(weights: np.ndarray) -> float:
        off = weights * (right - chances.max(1))
        parts = np.array_split(np.argsort(chances.max(1), kind="stable"), 10)
        return float(sum(abs(off[part].sum()) for part in parts) / weights.sum())

    weighed = {
        "area under risk over coverage": risk_area,
        "calibration error": calibration_error,
        "macro F1": lambda weights: f1_score(truth, said, average="macro", sample_weight=weights),
        "Matthews' correlation": lambda weights: matthews_corrcoef(truth, said, sample_weight=weights),
        "precision by class: b": lambda weights: precision_score(truth == 1, said == 1, sample_weight=weights),
        "average precision": average,
    }
    for title, figure in weighed.items():
        for question in (0, 17, 41):
            more, less = np.ones(60), np.ones(60)
            more[question], less[question] = 1 + 1e-4, 1 - 1e-4
            slope = (figure(more) - figure(less)) / 2e-4
            assert columns[title][question] - figure(np.ones(60)) == pytest.approx(60 * slope, abs=1e-4), title
    assert {"recall by class: a", "recall by class: b", "recall by class: c"} < set(columns)
    assert precision_scores(np.zeros(4, dtype=int), np.full((4, 2), 0.5)) is None


def test_the_spread_of_pseudo_values_is_the_variance_of_clustered_areas() -> None:
    random = np.random.default_rng(3)
    groups = np.arange(800) // 4
    truth = (random.random(800) < 0.3).astype(int)
    yes = 0.5 * truth + random.normal(size=800) + 0.5 * random.normal(size=200)[groups]
    areas = area_scores(truth, np.stack([-yes, yes], axis=1))
    assert areas is not None
    error = estimate(areas, groups).variance ** 0.5
    assert error == pytest.approx(obuchowski_error(truth == 1, yes, groups), rel=0.01)
