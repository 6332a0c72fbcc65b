"""Reads a JSON list such as `train.json` element by element, in bounded memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mslora_cr.utils.errors import DataError
from mslora_cr.utils.strict_json import STRICT_JSON, explain_json

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 16 << 20
"""The most that a damaged file can make us read; no conversation comes close."""
TOO_LONG = "a record of more than 16 MB"
_BLANKS = re.compile(r"[ \t\r\n]*")

Item = tuple[int, int, str, Any]
"""First byte, byte after the last, location in words, decoded JSON."""


class ListReader:
    """Walks a JSON list element by element through a window of text, so that no more than one element,
    or one chunk, is held at a time."""

    def __init__(self, path: Path, file: BinaryIO, hasher: hashlib._Hash):
        self.path, self.file, self.hasher = path, file, hasher
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position = "", 0  # The window, and our position in it.
        self.offset = 0  # The position of text[position], in bytes from the start of the file.
        self.index = 0
        self.ended = False

    def items(self) -> Iterator[Item]:
        if self._peek() == "\ufeff":  # A byte order mark, which programs on Windows put before UTF-8.
            self._advance(1)
        if self._peek() != "[":
            raise DataError(f"{self.path}: expected one list ([…]) of records")
        self._advance(1)
        closed = self._peek() == "]"
        while not closed:
            self._peek()
            start, value = self.offset, self._element()
            yield start, self.offset, f"record {self.index}", value
            separator = self._peek()
            if separator not in (",", "]"):
                self._fail("expected ',' or ']' after it" if separator else "the file ends inside the list")
            closed = separator == "]"
            if not closed:
                self._advance(1)
                self.index += 1
        self._advance(1)
        if self._peek():
            raise DataError(f"{self.path}: unexpected content after the end of the list")

    def _element(self) -> Any:
        if self._peek() != "{":
            self._fail("expected an object ({…})" if self.text else "the file ends inside the list")
        while True:
            try:
                value, end = STRICT_JSON.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                # The window may only end inside the element: widen it, up to a limit.
                held = len(self.text) - self.position
                if self.ended or not isinstance(error, json.JSONDecodeError):
                    self._fail(explain_json(error))
                if held > MAX_RECORD_BYTES:
                    self._fail(TOO_LONG)
                self._fill(max(held, CHUNK_BYTES))
            else:
                start = self.offset
                self._advance(end - self.position)
                if self.offset - start > MAX_RECORD_BYTES:
                    self._fail(TOO_LONG)
                return value

    def _peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            blanks = _BLANKS.match(self.text, self.position)
            assert blanks is not None, "the pattern also matches the empty string"
            self._advance(blanks.end() - self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._fill(CHUNK_BYTES)

    def _advance(self, count: int) -> None:
        self.offset += len(self.text[self.position : self.position + count].encode())
        self.position += count

    def _fill(self, size: int) -> None:
        data = self.file.read(size)
        self.hasher.update(data)
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            self._fail(explain_json(error))
        self.text, self.position = self.text[self.position :] + more, 0

    def _fail(self, problem: str) -> NoReturn:
        raise DataError(f"{self.path}: record {self.index}: {problem}")
