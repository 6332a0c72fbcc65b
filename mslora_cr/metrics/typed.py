"""Scores that fit the type of an answer: a choice, a number, a set of labels, or one of several accepted texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mslora_cr.data.answers.kinds import labels_of
from mslora_cr.data.records import AnswerKind, AnswerType
from mslora_cr.metrics.closed import class_of, said_class
from mslora_cr.metrics.measured import LabelMeasured
from mslora_cr.metrics.numbers import NEAR, number_in, share_of
from mslora_cr.metrics.published import normalize_answer, score_answers
from mslora_cr.statistics.intervals import Groups
from mslora_cr.statistics.matrix_intervals import Column

CHOICE = "exact choice"
"""Name of the score that tells whether the answer to a closed question says the true class and nothing else
(`said_class`)."""
COUNT, COUNT_NEAR = "exact count", f"count within {NEAR}"
LABELS, LABELS_EXACT = "label set F1", "exact label set"
BY_LABEL = ("sensitivity by label", "specificity by label")
MOST_LABELS = 50
"""At most this many labels of sets are measured one by one."""
SOFT = "soft accuracy"
ANNOTATORS = 10
"""VQA's soft accuracy takes this many annotators' answers."""
AGREED = 3
"""An answer that this many annotators gave is fully right."""
BEST = {
    "exact match score": "exact match, best truth",
    "f1 score": "F1, best truth",
    "rouge-l": "ROUGE-L, best truth",
}
"""Name of a score against the best of several accepted truths, by the score's name."""
TYPED = (CHOICE, COUNT, COUNT_NEAR, LABELS, SOFT, *BEST.values())


class Typed(NamedTuple):
    """A question with its answer.

    Attributes:
        truths: Every accepted answer.
        options: The options by letter; empty where the question offers none.
        answer_type: Whether the published evaluation takes the question as open or closed.
    """

    answer: str
    truths: Sequence[str]
    kind: AnswerKind
    options: Mapping[str, str]
    answer_type: AnswerType


def typed_scores(rows: Sequence[Typed]) -> dict[str, list[float | None]]:
    """Return every answer's score by name in `TYPED`, None where the score is not for such a question; names that apply
    to no question are left out."""
    by_row = [_scores_of(row) for row in rows]
    return {name: [scores.get(name) for scores in by_row] for name in TYPED if any(name in scores for scores in by_row)}


def _scores_of(row: Typed) -> dict[str, float]:
    scores: dict[str, float] = {}
    if row.kind == "choice":
        accepted = {class_of(truth, row.options) for truth in row.truths}
        scores[CHOICE] = float(said_class(row.answer, row.truths, row.options) in accepted)
    elif row.kind == "number":
        off = min(_distance(row.answer, truth) for truth in row.truths)
        scores |= {COUNT: float(off == 0), COUNT_NEAR: float(off <= NEAR)}
    elif row.kind == "set":
        scores[LABELS] = max(set_f1(label_set(row.answer), label_set(truth)) for truth in row.truths)
    if len(row.truths) > 1 and row.kind != "choice":
        scores |= _best(row)
    if len(row.truths) == ANNOTATORS:
        scores[SOFT] = soft_accuracy(row.answer, row.truths)
    return scores


def _distance(answer: str, truth: str) -> float:
    said, true = number_in(answer), number_in(truth)
    return float("inf") if said is None or true is None else abs(said - true)


def _best(row: Typed) -> dict[str, float]:
    pairs = [_Pair(row.answer, truth, row.answer_type) for truth in dict.fromkeys(row.truths)]
    columns = score_answers(pairs).columns
    best = {title: [score for score in columns[name] if score is not None] for name, title in BEST.items()}
    return {title: max(scores) for title, scores in best.items() if scores}


class _Pair(NamedTuple):
    text: str
    gt: str
    answer_type: AnswerType


def soft_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return VQA's accuracy: the mean of ``min(1, matches / 3)`` over the truths with one of them left out.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, as its evaluation code computes it.

    Args:
        answer: The answer as it was given.
        truths: The annotators' answers, which may repeat.
    """
    said = normalize_answer(answer.lower())
    agreed = [said == normalize_answer(truth.lower()) for truth in truths]
    matches = sum(agreed)
    return float(np.mean([min(1.0, (matches - one) / AGREED) for one in agreed]))


# --- sets of labels ---------------------------------------------------------------------------------------------------


def label_set(answer: str) -> frozenset[str]:
    """Return the labels of an answer, normalised as the published evaluation does."""
    labels = (normalize_answer(label.lower()) or label.casefold() for label in labels_of(answer))
    return frozenset(labels)


def set_f1(said: frozenset[str], true: frozenset[str]) -> float:
    """Return ``2 |said ∩ true| / (|said| + |true|)``; 1 for two empty sets."""
    return 2 * len(said & true) / (len(said) + len(true)) if said or true else 1.0


def label_figures(
    said: Sequence[frozenset[str]], true: Sequence[frozenset[str]], groups: Groups, most: int
) -> tuple[LabelMeasured, ...]:
    """Return sensitivity and specificity of the commonest labels, commonest first; None where no question has, or every
    question has, the label.

    Args:
        true: The true labels of each question.
        groups: (questions,), the number of each question's image or patient.
        most: Number of labels at most.
    """
    figures = []
    for label, columns in label_columns(said, true, groups, most).items():
        sensitivity, specificity = (share_of(*column) if len(column.scores) else None for column in columns)
        present, named = len(columns[0].scores), sum(label in labels for labels in said)
        figures.append(
            LabelMeasured(name=label, questions=present, said=named, sensitivity=sensitivity, specificity=specificity)
        )
    return tuple(figures)


def label_columns(
    said: Sequence[frozenset[str]], true: Sequence[frozenset[str]], groups: Groups, most: int
) -> dict[str, tuple[Column, Column]]:
    """Return, for the commonest labels, whether the answers to the questions that have the label name it, and whether
    those to the other questions do not. The arguments are those of `label_figures`."""
    frequent = Counter(label for labels in true for label in sorted(labels)).most_common(most)
    columns = {}
    for label, _ in frequent:
        named, present = (np.array([label in labels for labels in sets]) for sets in (said, true))
        columns[label] = _where(present, named, groups), _where(~present, ~named, groups)
    return columns


def _where(chosen: NDArray[np.bool_], right: NDArray[np.bool_], groups: Groups) -> Column:
    return Column(right[chosen].astype(np.float64), np.unique(groups[chosen], return_inverse=True)[1])
