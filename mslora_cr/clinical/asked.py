"""Questions with their answers, and what is known of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mslora_cr.data.answers.kinds import answer_kinds
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.records import AnswerKind, TestRecord
from mslora_cr.metrics.closed import class_of, said_class
from mslora_cr.metrics.numbers import is_count
from mslora_cr.metrics.typed import Typed, typed_scores
from mslora_cr.statistics.intervals import Scores


class AskedAnswer(NamedTuple):
    """A question with its answer.

    Attributes:
        truths: Every accepted answer, the first one first.
        closed: Whether the question has a closed set of answers.
        options: The options by letter; empty where the question offers none.
        kind: The kind of the answer: what the record states, or else what the true answers to the same question
            suggest.
        probabilities: The probability of each candidate, by its text; None where unknown.
        attributes: Attributes of patient and picture, by name.
    """

    question: str
    answer: str
    truths: tuple[str, ...]
    closed: bool
    options: Mapping[str, str]
    kind: AnswerKind
    probabilities: Mapping[str, float] | None
    attributes: Mapping[str, str | int | float]

    def at(self, temperature: float) -> AskedAnswer:
        """Return the same question with the probabilities ``p^(1/T) / Σ p^(1/T)``."""
        if not self.probabilities:
            return self
        weights = {text: chance ** (1 / temperature) for text, chance in self.probabilities.items()}
        return self._replace(probabilities={text: weight / sum(weights.values()) for text, weight in weights.items()})


def asked_answers(
    answers: Sequence[tuple[str, str, str, bool]],
    records: Sequence[TestRecord] | None,
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
) -> list[AskedAnswer]:
    """Join answers with what is known of their questions.

    Args:
        answers: Question, answer, truth and whether the question is closed.
        records: The records that were asked, in the same order; None where only the answers are known.
        probabilities: The probability of each candidate, by question.
    """
    by_answer = probabilities or [None] * len(answers)
    asked: Sequence[TestRecord | None] = records or [None] * len(answers)
    kinds = answer_kinds([one[0] for one in answers], [one[2] for one in answers], [one[3] for one in answers])
    return [
        AskedAnswer(
            question if record is None else record.text,
            final_answer(answer).text,
            _final([truth] if record is None else record.truths),
            closed,
            {} if record is None else record.options,
            _kind(record, kind, truth),
            chances,
            {} if record is None else record.attributes,
        )
        for (question, answer, truth, closed), record, kind, chances in zip(
            answers, asked, kinds, by_answer, strict=True
        )
    ]


def _final(truths: Sequence[str]) -> tuple[str, ...]:
    return tuple(final_answer(truth).text for truth in truths)


def _kind(record: TestRecord | None, seen: AnswerKind, truth: str) -> AnswerKind:
    if record is not None and record.answer_kind is not None:
        return record.answer_kind
    return "number" if seen == "text" and is_count(truth) else seen


def typed_columns(asked: Sequence[AskedAnswer]) -> dict[str, list[float | None]]:
    """Return the questions in the form that `typed_scores` takes."""
    return typed_scores(
        [Typed(one.answer, one.truths, one.kind, one.options, "CLOSED" if one.closed else "OPEN") for one in asked]
    )


def right_of(chosen: Sequence[AskedAnswer], answers: Sequence[str]) -> Scores:
    """Return which answers say the class of an accepted truth, (questions,)."""
    right = [
        said_class(answer, one.truths, one.options) in {class_of(truth, one.options) for truth in one.truths}
        for one, answer in zip(chosen, answers, strict=True)
    ]
    return np.array(right, dtype=np.float64)
