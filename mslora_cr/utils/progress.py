"""Progress: a bar in a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import io
import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines, where there is no terminal; what is done sooner gets none."""
LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"


class _Lines(io.TextIOBase):
    """Makes lines of what tqdm draws over and over, as a log file wants it."""

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
    """A `tqdm` bar in a terminal; without one, lines with the time left, at most one each `SECONDS`."""
    if sys.stderr.isatty():
        return tqdm(*args, **options)
    lines = {
        "position": 0,  # at another, as it gives to a bar inside a bar, tqdm moves the cursor
        "bar_format": LINE,
        "mininterval": SECONDS,
        "maxinterval": SECONDS,
        "delay": SECONDS,
        "file": _Lines(),
    }
    return tqdm(*args, **{**lines, **options})
