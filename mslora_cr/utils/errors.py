"""Base class of the errors that a user can fix, and phrases that their messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """An error in the user's input. The message says what is wrong, where, and how to fix it."""


class DataError(UserError):
    """The user's data are wrong. The message says what is wrong, and in which file, record and field."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def shorten(value: Any) -> str:
    """Return a value for a message: on one line, of a sensible length, without raw control characters."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= 60 else f"{text[:57]}…"


def first_problem(error: ValidationError) -> str:
    """Describe the first problem that pydantic found: the field, what was expected, what was found."""
    return problems_in(error)[0]


def problems_in(error: ValidationError) -> list[str]:
    """Describe every problem that pydantic found, worded as by `first_problem`."""
    return [_worded(problem) for problem in error.errors(include_url=False)]


def _worded(problem: Any) -> str:
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"]]
    field = "".join(steps).lstrip(".")
    if problem["type"] == "missing":
        return f"field '{field}' is missing"
    if problem["type"] == "too_short":
        return f"field '{field}' is empty"
    expected = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    expected = expected.replace("a valid tuple", "a list")
    where = f"field '{field}': " if field else ""
    return f"{where}{expected}; found {shorten(problem['input'])}"
