"""Journals: files that grow by one JSON line per result, each with a check, and are read again after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mslora_cr.utils.errors import UserError
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import decode_json

Entry = TypeVar("Entry")


def line_check(facts: str) -> str:
    """Return the check of a line: the first 16 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(facts.encode(errors="backslashreplace")).hexdigest()[:16]


def read_journal(
    path: Path, read: Callable[[dict[str, Any]], Entry], write: Callable[[Entry], bytes]
) -> tuple[list[Entry], int]:
    """Return the entries of a journal, and how many of its lines are damaged.

    A line is damaged if its entry, written again, would be another line: a kill cut it short, or somebody changed it.

    Args:
        read: Makes an entry of a decoded line; KeyError, TypeError or ValueError if it is none.
        write: The line of an entry, with its line break.
    """
    entries: list[Entry] = []
    damaged = 0
    for line in check_regular(path).read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            entry = read(decode_json(line))
            whole = write(entry) == line + b"\n"
        except (UserError, KeyError, TypeError, ValueError):
            whole = False
        if whole:
            entries.append(entry)
        else:
            damaged += 1
    return entries, damaged
