"""Multiple-choice options of a question: their letters, and their text in the prompt."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""The line that LLaVA's evaluation and lmms-eval put below the options."""


def lettered(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return options by their capital letters, in order: `["lung", "heart"]` becomes `{"A": "lung", "B": "heart"}`.

    Raises:
        ValueError: There are fewer than 2 or more than 26, or a mapping's keys are not the first letters in order.
    """
    letters = string.ascii_uppercase[: len(options)]
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(f"should offer between 2 and {len(string.ascii_uppercase)} options, not {len(options)}")
    if not isinstance(options, Mapping):
        return dict(zip(letters, options, strict=True))
    if "".join(key.strip().upper() for key in options) != letters:
        raise ValueError(f"should name its options {', '.join(letters)}, in this order, not {', '.join(options)}")
    return dict(zip(letters, options.values(), strict=True))


def with_options(question: str, options: Mapping[str, str]) -> str:
    """Return the question with its options below it, one per line, as LLaVA and lmms-eval ask it; unchanged without
    options."""
    if not options:
        return question
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items()), INSTRUCTION])


def rotated(options: Mapping[str, str], by: int) -> dict[str, str]:
    """Return the texts shifted by so many letters; a circular evaluation asks every rotation.

    Args:
        options: By letter.
        by: `1` gives the first letter the last text.
    """
    texts = list(options.values())
    return {letter: texts[(index - by) % len(texts)] for index, letter in enumerate(options)}


def letter_of(truth: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of a true answer, which is given as the letter or as the text of an option; None if it is
    neither.

    If an option's text is a single letter, the text is meant.
    """
    said = truth.strip().casefold()
    for letter, text in options.items():
        if text.strip().casefold() == said:
            return letter
    letter = truth.strip(" .()").upper()
    return letter if letter in options else None
