"""The kind of an answer: one of a few, a number, a set of labels, or free text, judged from all answers to its
question."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from mslora_cr.data.records import AnswerKind

_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d+)?")
_SEPARATORS = re.compile(r"\s*[|;,]\s*")
FEWEST = 5
"""With at least this many answers to a question, a set of labels can be distinguished from text with commas."""
LONGEST_LABEL = 40
FEWEST_REUSES = 2
"""How often a label of a set occurs on average in the answers to its question."""


def answer_kinds(questions: Sequence[str], answers: Sequence[str], closed: Sequence[bool]) -> list[AnswerKind]:
    """Return the kind of each answer. A closed question's answer is a choice; the answers to any other question have
    one kind.

    They are numbers if all of them are; sets if some have several labels between commas, semicolons or bars, each label
    is short, and labels recur; otherwise text.

    Args:
        answers: The true answer to each.
        closed: Whether each has a closed set of answers.
    """
    by_question: dict[str, list[str]] = defaultdict(list)
    for question, answer, chosen in zip(questions, answers, closed, strict=True):
        if not chosen:
            by_question[_plain(question)].append(answer.strip())
    kinds = {question: _kind(texts) for question, texts in by_question.items()}
    return ["choice" if chosen else kinds[_plain(question)] for question, chosen in zip(questions, closed, strict=True)]


def labels_of(answer: str) -> list[str]:
    """Return the labels of a set, without their separators."""
    return [label for label in _SEPARATORS.split(answer.strip(" .")) if label]


def _plain(question: str) -> str:
    return " ".join(question.casefold().split())


def _kind(answers: Sequence[str]) -> AnswerKind:
    if all(_NUMBER.fullmatch(answer) for answer in answers):
        return "number"
    labels = Counter(label.casefold() for answer in answers for label in labels_of(answer))
    several = any(len(labels_of(answer)) > 1 for answer in answers)
    short = all(len(label) <= LONGEST_LABEL for label in labels)
    if several and short and len(answers) >= FEWEST and labels.total() >= FEWEST_REUSES * len(labels):
        return "set"
    return "text"
