"""Settings of `benchmarks.coverage` about classes, counts, differences of two systems' figures, and subgroups.

`three classes` have 10, 30 and 60 % of the questions. `counts` are off by a Poisson number that the questions of an
image share in part. `figures of two systems` are as good as each other. `permuted labels` splits patients at random
into three groups, none of which differs in truth.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.coverage import CORRELATION, QUESTIONS, SEPARATION, Trial, answers, covers, groups_of
from mslora_cr.metrics.by_class import class_columns
from mslora_cr.metrics.closed import Confusion, confusion_figures
from mslora_cr.metrics.numbers import count_figures
from mslora_cr.statistics.intervals import Groups, Scores, difference_interval, estimate
from mslora_cr.statistics.matrix_intervals import Column, is_binary
from mslora_cr.statistics.significance import flipped_means, p_value
from mslora_cr.statistics.subgroups import subgroups

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
                found[f"figures of two systems, {questions}{more}, {prevalence:.0%} yes"] = _two(groups, prevalence)
    found["permuted labels, 60 patients of 4"] = _permuted
    return found


def _three_classes(groups: Groups) -> Trial:
    expected = SHARES * ACCURACY
    table = np.array(
        [[SHARES[i] * (1 - ACCURACY[i]) / 2 if i != j else expected[i] for j in range(3)] for i in range(3)]
    )
    true, said = table.sum(1), table.sum(0)
    spread = (1 - np.square(true).sum()) * (1 - np.square(said).sum())
    truth = {
        "balanced accuracy": float(ACCURACY.mean()),
        "macro F1": float(np.mean(2 * expected / (true + said))),
        "Matthews' correlation": float((expected.sum() - (true * said).sum()) / spread**0.5),
    }

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        known = confusion_figures(_said_of_three(generator, groups))
        return {
            name: covers(known[name].interval, value)
            for name, value in truth.items()
            if known[name].interval is not None
        }

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
        error = found.mean_absolute_error
        exact = float((4 / 5) ** 4) if shared else float(np.exp(-1))
        return {
            "mean absolute error": error is not None and covers(error.interval, 1.0),
            "exact count": covers(found.exact.interval, exact),
        }

    return trial


def _two(groups: Groups, prevalence: float) -> Trial:
    """Two systems with sensitivity 0.8 and specificity 0.9 on the same questions, and their paired differences."""

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        yes = generator.random(len(groups)) < prevalence
        one, other = (_columns(generator, groups, yes) for _ in range(2))
        outcomes: dict[str, bool] = {}
        for title in one.keys() & other.keys():
            values, clusters = other[title].scores - one[title].scores, one[title].groups
            binary = is_binary(one[title].scores) and is_binary(other[title].scores)
            outcomes[f"difference of {title}"] = covers(difference_interval(estimate(values, clusters), binary), 0.0)
            outcomes[f"p of {title}"] = p_value(float(values.mean()), flipped_means(values, clusters, FLIPS)) < 0.05
        return dict(sorted(outcomes.items()))

    return trial


def _columns(generator: np.random.Generator, groups: Groups, yes: Scores) -> Mapping[str, Column]:
    right = answers(generator, groups, 0.8) * yes + answers(generator, groups, 0.9) * ~yes
    said = np.where(right == 1, yes, ~yes).astype(int)
    common = generator.normal(size=int(groups.max()) + 1)[groups]
    alone = generator.normal(size=len(yes))
    scores = SEPARATION * yes + CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * alone
    return class_columns(Confusion(("no", "yes"), yes.astype(int), said, groups), np.stack([-scores, scores], axis=1))


def _permuted(generator: np.random.Generator) -> Mapping[str, bool]:
    patients = np.arange(240) // 4
    scores = answers(generator, patients, 0.75)
    labels = np.array(CLASSES)[generator.integers(3, size=60)[patients]]
    found = subgroups(scores, patients, labels.tolist())
    by_chance = [group.p for group in found.groups.values() if group.p is not None]
    return {"p of any group": min(by_chance, default=1.0) < 0.05}
