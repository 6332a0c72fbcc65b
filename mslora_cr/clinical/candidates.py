"""Finds the closed set of answers to a question, so that each of them can be scored."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.records import TestRecord
from mslora_cr.metrics.closed import NO, YES
from mslora_cr.metrics.guessing import Frequencies, question_key

MOST_CANDIDATES = 32
"""A question to which training gives more different answers than this has no closed set of answers."""
_OPPOSITE = {YES: NO, NO: YES}


def candidate_answers(records: Iterable[TestRecord], training: Frequencies | None) -> list[tuple[str, ...]]:
    """Return the closed set of answers to each question, in alphabetical order; empty where there is none.

    A question with options has these, as letters where its truth is a letter. Another CLOSED question has "no" and
    "yes" where training gives no other answer to the same question or, if training does not have the question, where
    the test file gives no other answer. Both are then candidates, so the truth is not given away. Any other CLOSED
    question has the different answers that training gives to the same question, each in its most frequent spelling. A
    single answer is no set, nor are more than `MOST_CANDIDATES`.

    Args:
        training: How often each answer follows each question in training; None where unknown.
    """
    asked = list(records)
    truths: dict[str, Counter[str]] = defaultdict(Counter)
    for record in asked:
        if record.answer_type == "CLOSED":
            truths[question_key(record.text)][final_answer(record.gt).text] += 1
    by_question = training or {}
    sets = {key: _closed_set(by_question[key]) if by_question.get(key) else _yes_and_no(truths[key]) for key in truths}
    return [
        _offered(record) or (sets[question_key(record.text)] if record.answer_type == "CLOSED" else ())
        for record in asked
    ]


def _offered(record: TestRecord) -> tuple[str, ...]:
    letters = tuple(record.options)
    return letters if final_answer(record.gt).text in letters else tuple(record.options.values())


def _closed_set(answers: Counter[str]) -> tuple[str, ...]:
    spellings = _spellings(answers)
    if not spellings.keys() - _OPPOSITE.keys():
        return _yes_and_no(answers)
    if not 2 <= len(spellings) <= MOST_CANDIDATES:
        return ()
    return tuple(spellings[key] for key in sorted(spellings))


def _yes_and_no(answers: Counter[str]) -> tuple[str, ...]:
    """Return both words, spelt as the answers are, where every answer is one of them."""
    spellings = _spellings(answers)
    if not spellings or spellings.keys() - _OPPOSITE.keys():
        return ()
    for word in list(spellings):
        other = _OPPOSITE[word]
        capital, mark = spellings[word][0].isupper(), spellings[word][len(word) :]
        spellings.setdefault(other, (other.capitalize() if capital else other) + mark)
    return spellings[NO], spellings[YES]


def _spellings(answers: Counter[str]) -> dict[str, str]:
    """Return the most frequent spelling of each answer, by the answer without case and full stop."""
    spellings: dict[str, str] = {}
    for answer, _ in sorted(answers.items(), key=lambda item: (-item[1], item[0])):
        spellings.setdefault(answer.strip(" .").casefold(), answer.strip())
    spellings.pop("", None)
    return spellings
