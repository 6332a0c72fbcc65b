"""What guessing gives: the most frequent training answer to the same question, and the best constant in hindsight."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.records import TrainingRecord

FEWEST = 10
"""A question text has a constant answer of its own in hindsight from this many questions on."""
Frequencies = Mapping[str, Counter[str]]
"""How often each answer is given, by question as `question_key` spells it."""


class Guesses(NamedTuple):
    """Constant answers.

    Attributes:
        answers: The guess for each question asked; None where no guess is known.
        unseen: Number of questions asked that do not occur in training.
    """

    answers: list[str | None]
    unseen: int


def question_key(question: str) -> str:
    """Return a question without case, spacing and the marker of an image: the same words are the same question."""
    return " ".join(question.replace("<image>", " ").split()).casefold()


def training_answers(records: Iterable[TrainingRecord]) -> Frequencies:
    """Count how often each answer, by its final part, follows each question in training records."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for asked, given in zip(record.turns[::2], record.turns[1::2], strict=False):
            answers[question_key(asked.text)][final_answer(given.text).text.strip()] += 1
    return answers


def majority_guesses(questions: Sequence[str], training: Frequencies) -> Guesses:
    """Return the most frequent training answer to the same question. For a question that training does not have, it is
    the most frequent answer to all questions asked that training has."""
    keys = [question_key(question) for question in questions]
    overall: Counter[str] = Counter()
    for key in set(keys):
        overall.update(training.get(key, {}))
    fallback = _commonest(overall)
    guesses = [_commonest(training[key]) if training.get(key) else fallback for key in keys]
    return Guesses(guesses, sum(key not in training for key in keys))


def hindsight_guesses(questions: Sequence[str], truths: Sequence[str]) -> list[str]:
    """Return the constant answer to each question that would have been right most often.

    Questions asked fewer than `FEWEST` times share one constant: the best answer to a question asked once is no guess.
    """
    keys = [question_key(question) for question in questions]
    asked = Counter(keys)
    shared = [key if asked[key] >= FEWEST else "" for key in keys]
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for key, truth in zip(shared, truths, strict=True):
        by_question[key][truth.strip().lower()] += 1
    return [_commonest(by_question[key]) or "" for key in shared]


def _commonest(answers: Counter[str]) -> str | None:
    return max(answers, key=lambda answer: (answers[answer], answer)) if answers else None
