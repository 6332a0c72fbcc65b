"""Reads answers to questions with options: the letter, the letter with its text, or the text. Answers that fit none are
counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mslora_cr.data.answers.options import letter_of
from mslora_cr.metrics.words import number_words

Status = Literal["parsed", "unparsed", "ambiguous"]
_OPENING = re.compile(r"^\W*(?:(?:the )?(?:correct |right |best )?(?:answer|option|choice)(?: is)?\W*)?", re.IGNORECASE)


class Choice(NamedTuple):
    """What an answer chose.

    Attributes:
        status: `ambiguous` where the answer names several options.
        letter: The option's letter, where the answer was parsed.
    """

    status: Status
    letter: str | None = None


def parse_choice(answer: str, options: Mapping[str, str]) -> Choice:
    """Return the option that an answer chooses.

    The first rule that applies decides: the whole answer is a letter or the text of one option; it opens with a letter,
    marked as one (`B.`, `(B)`, `B: …`), and marks no other; exactly one letter is marked anywhere; exactly one option's
    text stands in it as whole words (a text inside another option's text does not count). A number is one word.

    Args:
        answer: The answer as it was given.
        options: Texts by capital letter.
    """
    answer, options = number_words(answer), {letter: number_words(text) for letter, text in options.items()}
    said = _OPENING.sub("", answer.strip(), count=1).strip()
    for text in (answer, said):
        if letter := letter_of(text.rstrip(".!"), options):
            return Choice("parsed", letter)
    letters = "".join(options)
    opening = re.match(rf"\(?([{letters}])(?:[.):,]|\s*$|\s+-)", said)
    marked = {*re.findall(rf"(?<!\w)\(?([{letters}])[.):](?!\w)", answer), *([opening[1]] if opening else [])}
    if marked:
        return Choice("parsed", marked.pop()) if len(marked) == 1 else Choice("ambiguous")
    return _by_text(answer, options)


def _by_text(answer: str, options: Mapping[str, str]) -> Choice:
    spans = {letter: _spans(text, answer) for letter, text in options.items()}
    outer = {
        letter for letter, of_letter in spans.items() if any(not _inside(span, spans, letter) for span in of_letter)
    }
    if len(outer) == 1:
        return Choice("parsed", outer.pop())
    return Choice("ambiguous" if outer else "unparsed")


def _spans(text: str, answer: str) -> list[tuple[int, int]]:
    pattern = rf"(?<!\w){re.escape(text.strip())}(?!\w)"
    return [match.span() for match in re.finditer(pattern, answer, re.IGNORECASE)]


def _inside(span: tuple[int, int], spans: Mapping[str, Sequence[tuple[int, int]]], letter: str) -> bool:
    """Return whether a longer text of another option covers a place."""
    start, end = span
    return any(
        first <= start and end <= last and last - first > end - start
        for other, of_other in spans.items()
        if other != letter
        for first, last in of_other
    )


def counts_of(choices: Sequence[Choice]) -> dict[Status, int]:
    """Count the answers that were parsed, were not parsed, and named several options."""
    counts = Counter(choice.status for choice in choices)
    return {"parsed": counts["parsed"], "unparsed": counts["unparsed"], "ambiguous": counts["ambiguous"]}
