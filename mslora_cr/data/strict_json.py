"""JSON from outside: decoded strictly, and what is wrong with it in words."""

import json
import math
from typing import Any, NoReturn

from pydantic import ValidationError


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is too large a number")
    return value


STRICT_JSON = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_finite)
"""Decodes JSON from outside: numbers are finite, NaN and Infinity are refused."""


def explain_json(error: Exception) -> str:
    """What is wrong with a text that was to be JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}, near {error.doc[max(error.pos - 20, 0) : error.pos + 20]!r}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text; save the file as UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"not acceptable JSON: {error}"  # a number of thousands of digits, NaN, Infinity


def first_problem(error: ValidationError) -> str:
    """The first problem pydantic found: field, if it is one's, what was expected, what was found."""
    return problems_in(error)[0]


def problems_in(error: ValidationError) -> list[str]:
    """Every problem pydantic found, as `first_problem` words it."""
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


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
