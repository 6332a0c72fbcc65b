"""Escapes control characters and direction marks of text from files before it is printed."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

MOST = 1_000
"""The longest run of characters without a space that is shown whole; no name needs more."""
_LONG = re.compile(rf"\S{{{MOST},}}")


def visible(text: str) -> str:
    """Escape control characters, surrogates and direction marks, and shorten endless words."""
    printable = text if text.isprintable() else "".join(mark if mark.isprintable() else _escaped(mark) for mark in text)
    return (
        _LONG.sub(lambda word: f"{word[0][: MOST // 2]}…{word[0][-20:]}", printable)
        if len(printable) > MOST
        else printable
    )


def _escaped(mark: str) -> str:
    return mark if mark in "\n\t" else ascii(mark)[1:-1]


class NobodyReadsError(BrokenPipeError):
    """Whoever read standard output has gone, as `head` does once it has seen enough."""


def is_first_rank() -> bool:
    """Return whether this is the first of the processes that a launcher started, or there is no launcher."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


class _Visible:
    """Wraps a stream: escapes what the first rank writes, drops what other ranks write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if is_first_rank():
            with _reader_of(self._stream):
                self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        with _reader_of(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def _reader_of(stream: TextIO) -> Iterator[None]:
    """Distinguish a reader that has gone from every other broken pipe."""
    try:
        yield
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Otherwise Python would complain at exit.
        raise NobodyReadsError(*error.args) from None


@contextmanager
def visible_results() -> Iterator[None]:
    """Escape what is printed to standard output inside the block, and print it once under a launcher.

    Characters that its encoding lacks are escaped, as on standard error.

    Raises:
        NobodyReadsError: Nobody reads standard output any more; what is printed afterwards is dropped.
    """
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    stream_shown = sys.stdout = _Visible(stream)
    try:
        yield
    finally:
        sys.stdout = stream
        stream_shown.flush()


def print_json(text: str) -> None:
    """Print JSON to standard output: whole, and on every console valid. Characters that are not printable, or that the
    console's encoding lacks, become JSON's own escapes.
    """
    stream = sys.stdout._stream if isinstance(sys.stdout, _Visible) else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with _reader_of(stream):
        if is_first_rank():
            stream.write("".join(mark if _shown(mark, encoding) else json.dumps(mark)[1:-1] for mark in text) + "\n")
            stream.flush()


def _shown(mark: str, encoding: str) -> bool:
    return mark == "\n" or (mark.isprintable() and mark.encode(encoding, "ignore") != b"")
