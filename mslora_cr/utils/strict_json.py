"""The only JSON reader; it refuses repeated keys, NaN and numbers that are too large."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mslora_cr.utils.errors import UserError, shorten
from mslora_cr.utils.regular import check_regular

MAX_BYTES = 64 << 20
"""The largest file that is read whole; no file of a run or a model folder comes close."""
MOST_DIGITS = 300
"""The longest integer; a longer one would be infinite as a float."""


class JsonError(UserError):
    """A file is not the JSON that was expected. The message names it."""


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(twice)} appears twice in an object")
    return result


STRICT_JSON = json.JSONDecoder(
    parse_constant=_reject_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_distinct
)
"""Decodes JSON from outside: numbers must be finite and keys distinct; NaN and Infinity are refused."""


def explain_json(error: Exception) -> str:
    """Describe the error in a text that is not valid JSON."""
    if isinstance(error, UnicodeDecodeError) or "\0" in getattr(error, "doc", "")[:4]:  # UTF-16 may pass as UTF-8.
        return "not UTF-8 text; save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}, near {error.doc[max(error.pos - 20, 0) : error.pos + 20]!r}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"not acceptable JSON: {error}"  # An integer of thousands of digits, NaN, Infinity, or a repeated key.


def decode_json(data: bytes) -> Any:
    """Decode JSON from UTF-8 bytes, with or without a byte order mark.

    Raises:
        JsonError: The message says what is wrong, but not where.
    """
    try:
        return STRICT_JSON.decode(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise JsonError(explain_json(error)) from None


def read_bytes(path: Path) -> bytes:
    """Read a whole file that is small by its nature.

    Raises:
        JsonError: It is missing, unreadable, no regular file, or far too large.
    """
    try:
        if check_regular(path).stat().st_size > MAX_BYTES:
            raise JsonError(f"{path}: larger than {MAX_BYTES >> 20} MiB, too large for a file of this kind")
        return path.read_bytes()
    except OSError as error:
        raise JsonError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        JsonError: The message names the file and what is wrong.
    """
    try:
        return decode_json(read_bytes(path))
    except JsonError as error:
        raise error if str(path) in str(error) else JsonError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        JsonError: As `read_json`; or the file holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise JsonError(f"{path}: expected an object ({{…}}), found {shorten(content)}")
    return content
