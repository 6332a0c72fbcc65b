"""Settings of `benchmarks.coverage` about classes, counts, differences of two systems' figures, and subgroups.

`yes or no` has sensitivity 0.8 and specificity 0.9, and scores of the classes that are 1.5 standard deviations apart.
`three classes` have 10, 30 and 60 % of the questions. `counts` are off by a Poisson number that the questions of an
image share in part. `figures of two systems` are as good as each other, and too sure. Of `one system surer than the
other` only the first is too sure, so calibration errors and Brier's scores differ. `permuted labels` splits patients at
random into three groups, none of which differs in truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr, ndtri

from benchmarks.coverage import CORRELATION, QUESTIONS, Trial, answers, covers, groups_of
from mslora_cr.metrics.by_class import (
    AUROC,
    AVERAGE_PRECISION,
    BRIER,
    CALIBRATION_ERROR,
    brier_scores,
    class_columns,
    confidence_scores,
    macro_areas,
)
from mslora_cr.metrics.closed import Confusion, class_figures, confusion, confusion_figures
from mslora_cr.metrics.discrimination import auroc, average_precision
from mslora_cr.metrics.measured import Measured
from mslora_cr.metrics.numbers import count_figures
from mslora_cr.statistics.intervals import Groups, Scores, difference_interval, estimate
from mslora_cr.statistics.matrix_intervals import Column, is_binary
from mslora_cr.statistics.significance import flipped_means, p_value
from mslora_cr.statistics.subgroups import subgroups

SEPARATION = 1.5
"""Of the scores of questions inside and outside a class, in standard deviations."""
SHARPNESS = 2.0
"""By which the log odds of two systems are too far from zero."""
FLIPS = 1000
SHARES = np.array([0.1, 0.3, 0.6])
CLASSES = ("a", "b", "c")
ACCURACY = np.array([0.6, 0.7, 0.9])
"""Recall of each class; what is wrong says either of the other two."""


def class_settings() -> dict[str, Trial]:
    found: dict[str, Trial] = {}
    for questions in QUESTIONS:
        for more, groups in groups_of(questions).items():
            found[f"three classes, {questions}{more}"] = _three_classes(groups)
            found[f"counts, {questions}{more}"] = _counts(groups)
            for prevalence in (0.05, 0.5):
                found[f"yes or no, {questions}{more}, {prevalence:.0%} yes"] = _yes_or_no(groups, prevalence)
                found[f"figures of two systems, {questions}{more}, {prevalence:.0%} yes"] = _two(groups, prevalence)
                unlike = f"one system surer than the other, {questions}{more}, {prevalence:.0%} yes"
                found[unlike] = _two(groups, prevalence, 1.0)
    found["permuted labels, 60 patients of 4"] = _permuted
    return found


def _yes_or_no(groups: Groups, prevalence: float) -> Trial:
    """Sensitivity 0.8 and specificity 0.9; scores of the classes are 1.5 standard deviations apart.

    An interval that is not shown, since a class has too few questions or images, counts as neither.
    """
    truth = _true_figures(prevalence)
    truth |= {"AUROC": true_area(), "average precision": true_average_precision(prevalence)}

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        yes = generator.random(len(groups)) < prevalence
        right = answers(generator, groups, 0.8) * yes + answers(generator, groups, 0.9) * ~yes
        said = ["yes" if one == bool(hit) else "no" for one, hit in zip(yes, right, strict=True)]
        known = confusion_figures(confusion(said, [["yes"] if one else ["no"] for one in yes], groups))
        scores = class_scores(generator, yes, groups)
        if yes.any():
            known |= {"AUROC": auroc(yes, scores, groups), "average precision": average_precision(yes, scores, groups)}
        return outcomes(truth, known)

    return trial


def class_scores(generator: np.random.Generator, of_class: NDArray[Any], groups: Groups) -> Scores:
    """Normal scores of the same shape as `of_class`, (questions,) or (questions, classes), which is 1 where the class
    is true; those of a cluster correlate."""
    common = generator.normal(size=(int(groups.max()) + 1, *of_class.shape[1:]))[groups]
    alone = generator.normal(size=of_class.shape)
    return SEPARATION * of_class + CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * alone


def outcomes(truth: Mapping[str, float], known: Mapping[str, Measured | None]) -> dict[str, bool]:
    """Whether each interval covers the truth, of the figures that have one."""
    shown = {name: figure for name in truth if (figure := known.get(name)) is not None and figure.interval is not None}
    return {name: covers(figure.interval, truth[name]) for name, figure in shown.items()}


def true_area() -> float:
    return float(ndtr(SEPARATION / 2**0.5))


def _true_figures(prevalence: float) -> dict[str, float]:
    """What infinitely many questions give at sensitivity 0.8 and specificity 0.9."""
    hits, misses = 0.8 * prevalence, 0.2 * prevalence
    alarms, rejections = 0.1 * (1 - prevalence), 0.9 * (1 - prevalence)
    margins = (hits + misses) * (hits + alarms) * (rejections + alarms) * (rejections + misses)
    of_yes, of_no = (2 * right / (2 * right + misses + alarms) for right in (hits, rejections))
    return {
        "sensitivity": 0.8,
        "specificity": 0.9,
        "PPV": hits / (hits + alarms),
        "NPV": rejections / (rejections + misses),
        "balanced accuracy": 0.85,
        "macro F1": (of_yes + of_no) / 2,
        "Matthews' correlation": (hits * rejections - alarms * misses) / margins**0.5,
    }


def true_average_precision(prevalence: float) -> float:
    """The mean precision over the thresholds that the positive questions' scores set, by the midpoint rule."""
    recall = (np.arange(100_000) + 0.5) / 100_000
    alarms = ndtr(-SEPARATION - ndtri(1 - recall))
    return float(np.mean(prevalence * recall / (prevalence * recall + (1 - prevalence) * alarms)))


def _three_classes(groups: Groups) -> Trial:
    expected = SHARES * ACCURACY
    table = np.array(
        [[SHARES[i] * (1 - ACCURACY[i]) / 2 if i != j else expected[i] for j in range(3)] for i in range(3)]
    )
    true, said = table.sum(1), table.sum(0)
    spread = (1 - np.square(true).sum()) * (1 - np.square(said).sum())
    truth = {
        **{f"recall of {name}": float(share) for name, share in zip(CLASSES, ACCURACY, strict=True)},
        **{f"precision of {name}": float(share) for name, share in zip(CLASSES, expected / said, strict=True)},
        f"macro {AUROC}": true_area(),
        f"macro {AVERAGE_PRECISION}": float(np.mean([true_average_precision(share) for share in SHARES])),
        "balanced accuracy": float(ACCURACY.mean()),
        "macro F1": float(np.mean(2 * expected / (true + said))),
        "Matthews' correlation": float((expected.sum() - (true * said).sum()) / spread**0.5),
    }

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        table = _said_of_three(generator, groups)
        chances = class_scores(generator, np.eye(3)[table.truth], groups)
        known: dict[str, Measured | None] = {**confusion_figures(table), **macro_areas(table, chances)}
        for name, figures in class_figures(table).items():
            known |= dict(zip((f"recall of {name}", f"precision of {name}"), figures, strict=True))
        return outcomes(truth, known)

    return trial


def _said_of_three(generator: np.random.Generator, groups: Groups) -> Confusion:
    truth = generator.choice(3, size=len(groups), p=SHARES)
    right = np.select([truth == one for one in range(3)], [answers(generator, groups, share) for share in ACCURACY])
    other = (truth + generator.integers(1, 3, size=len(groups))) % 3
    return Confusion(CLASSES, truth, np.where(right == 1, truth, other), groups)


def _counts(groups: Groups) -> Trial:
    """Answers are too large by a number whose mean is drawn for each image from a gamma distribution with mean 1."""

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        shared = len(np.unique(groups)) < len(groups)
        means = generator.gamma(4, 1 / 4, size=int(groups.max()) + 1)[groups] if shared else np.ones(len(groups))
        true = generator.integers(0, 9, size=len(groups))
        said = true + generator.poisson(means)
        found = count_figures([str(value) for value in said], [str(value) for value in true], groups)
        exact = float((4 / 5) ** 4) if shared else float(np.exp(-1))
        return outcomes(
            {"mean absolute error": 1.0, "exact count": exact},
            {"mean absolute error": found.mean_absolute_error, "exact count": found.exact},
        )

    return trial


def _two(groups: Groups, prevalence: float, sharper: float = SHARPNESS) -> Trial:
    """Two systems with sensitivity 0.8 and specificity 0.9 on the same questions, and their paired differences.

    Args:
        sharper: By how much the second system's log odds are too far from zero; the first one's are by `SHARPNESS`.
    """

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        yes = generator.random(len(groups)) < prevalence
        one, other = (_columns(generator, groups, yes, prevalence, sharpness) for sharpness in (SHARPNESS, sharper))
        found: dict[str, bool] = {}
        for title in one.keys() & other.keys():
            values, clusters = other[title].scores - one[title].scores, one[title].groups
            binary = is_binary(one[title].scores) and is_binary(other[title].scores)
            ends = difference_interval(estimate(values, clusters), binary)
            truth = _true_difference(title, prevalence, sharper)
            # A comparison tests calibration errors but shows no interval of their difference.
            hidden = " (not shown)" if title == CALIBRATION_ERROR else ""
            found[f"difference of {title}{hidden}"] = covers(ends, truth)
            if not truth:
                found[f"p of {title}"] = p_value(float(values.mean()), flipped_means(values, clusters, FLIPS)) < 0.05
        return dict(sorted(found.items()))

    return trial


def _columns(
    generator: np.random.Generator, groups: Groups, yes: Scores, prevalence: float, sharpness: float
) -> Mapping[str, Column]:
    """The figures of a system whose log odds are `sharpness` times those that its scores are worth."""
    right = answers(generator, groups, 0.8) * yes + answers(generator, groups, 0.9) * ~yes
    said = np.where(right == 1, yes, ~yes).astype(int)
    chances = _chances(generator, yes, groups, prevalence, sharpness)
    return class_columns(Confusion(("no", "yes"), yes.astype(int), said, groups), chances)


def _chances(
    generator: np.random.Generator, yes: NDArray[Any], groups: Groups, prevalence: float, sharpness: float
) -> Scores:
    """Probabilities of no and yes, (questions, 2)."""
    odds = SEPARATION * (class_scores(generator, yes, groups) - SEPARATION / 2) + logit(prevalence)
    return np.stack([expit(-sharpness * odds), expit(sharpness * odds)], axis=1)


@cache
def _true_difference(title: str, prevalence: float, sharper: float) -> float:
    """What a million questions give; how sure a system is changes only two figures."""
    if sharper == SHARPNESS or title not in (BRIER, CALIBRATION_ERROR):
        return 0.0
    many = np.arange(1_000_000)
    yes = many < prevalence * len(many)
    known = []
    for sharpness in (SHARPNESS, sharper):
        chances = _chances(np.random.default_rng(5), yes, many, prevalence, sharpness)
        scores = confidence_scores(yes, chances) | {BRIER: brier_scores(yes.astype(int), chances)}
        known.append(float(scores[title].mean()))
    return known[1] - known[0]


def _permuted(generator: np.random.Generator) -> Mapping[str, bool]:
    patients = np.arange(240) // 4
    scores = answers(generator, patients, 0.75)
    labels = np.array(CLASSES)[generator.integers(3, size=60)[patients]]
    found = subgroups(scores, patients, labels.tolist())
    by_chance = [group.p for group in found.groups.values() if group.p is not None]
    return {"p of any group": min(by_chance, default=1.0) < 0.05}
