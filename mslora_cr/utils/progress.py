"""Progress: a bar in a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import io
import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Seconds between two lines where there is no terminal. Work that takes less time gets no line."""
LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"


class _Lines(io.TextIOBase):
    """Turns what tqdm redraws again and again into lines for a log file."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> int:
        line = text.strip()
        if line and line != self._last:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
            self._last = line
        return len(text)


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """Return a `tqdm` bar in a terminal; elsewhere, lines with the time left, at most one in `SECONDS`."""
    if sys.stderr.isatty():
        return tqdm(*args, **options)
    lines = {
        "position": 0,  # At any other position, such as that of a nested bar, tqdm moves the cursor.
        "bar_format": LINE,
        "mininterval": SECONDS,
        "maxinterval": SECONDS,
        "delay": SECONDS,
        "file": _Lines(),
    }
    return tqdm(*args, **{**lines, **options})
