"""Tables of text, separated by commas, tabs, semicolons or bars: read strictly, a line at a time."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from mslora_cr.data.records import DataError
from mslora_cr.data.rows.row import Columns, Problem, Remark, Row, known_columns, table_row
from mslora_cr.utils.regular import check_regular

DELIMITERS = ",;\t|"
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MOST_FIELD = 48 << 20
"""The most characters of a field: enough for a picture of 32 MB in base64."""
MOST_HEADER = 1 << 20
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # the first is where UTF-32's begins, too


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        number: The line at which it begins, from 1.
        fields: As many as the header has.
        problem: Why it cannot be used, if it cannot.
    """

    number: int
    fields: Sequence[str]
    problem: str | None = None


def read_table(path: Path, columns: Columns, question: str | None, remark: Remark) -> Iterator[Row | Problem]:
    """Yield the rows of a .csv or .tsv file.

    Raises:
        DataError: It cannot be read, is no table, or lacks a column.
    """
    try:
        encoding = encoding_of(check_regular(path), remark)
        with path.open(newline="", encoding=encoding) as file:
            lines = table_lines(file, path, "\t" if path.suffix.lower() == ".tsv" else ",", remark)
            names = next(lines).fields
            matched = known_columns(path, names, columns, question, remark)
            pictures: dict[str, str] = {}
            for line in lines:
                location = f"{path.name}: line {line.number}"
                if line.problem:
                    yield line.problem, location
                    continue
                values: dict[str, Any] = dict(zip(names, line.fields, strict=True))
                _refer(values, matched.image, pictures)
                yield table_row(location, values, matched, question)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: neither UTF-8 nor Latin-1; save it as CSV in UTF-8") from None


def _refer(values: dict[str, Any], image: str, pictures: dict[str, str]) -> None:
    """Resolve VLMEvalKit's references: a short number in place of a picture is the index of the row that has it."""
    index, picture = values.get("index"), values[image]
    if index is None:
        return
    if len(picture) > 64:
        pictures.clear()  # Rows that share a picture follow the row that has it.
        pictures[index] = picture
    elif picture in pictures:
        values[image] = pictures[picture]


def encoding_of(path: Path, remark: Remark) -> str:
    """Return the encoding: UTF-8 (with or without a byte order mark), UTF-16 or UTF-32 with one, or else Windows'
    Latin-1, with a remark."""
    with path.open("rb") as file:
        start = file.read(4)
        if marked := next((encoding for mark, encoding in _BOMS.items() if start.startswith(mark)), None):
            return marked
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            remark("the table is not in UTF-8, and is read as Latin-1 (Windows-1252)")
            return "cp1252"
    return "utf-8-sig"


def table_lines(file: TextIO, path: Path, delimiter: str, remark: Remark) -> Iterator[Line]:
    """Yield the header, then the rows. Blank lines and empty fields beyond the header, as Excel writes them, are
    skipped.

    Args:
        file: Opened with `newline=""`.
        path: Names it in messages.
        delimiter: The delimiter, unless the header shows another one.
        remark: Called with a remark about another delimiter.

    Raises:
        DataError: A misplaced quote would join rows, a field has no end, or the header is UTF-16 without a mark.
    """
    raw = _Lines(file)
    first = raw.peek(path)
    if "\0" in first:
        raise DataError(f"{path}: not UTF-8 text; save it as CSV in UTF-8")
    if sep := re.fullmatch(r"sep=(.)\r?\n?", first):  # This is Excel's own first line.
        next(raw)
        delimiter, first = sep[1], raw.peek(path)
    else:
        delimiter = _delimiter(first, delimiter, remark)
    before = csv.field_size_limit(MOST_FIELD)
    try:
        reader = csv.reader(raw, delimiter=delimiter, strict=True)
        header: Sequence[str] = ()
        while True:
            raw.begin()
            try:
                fields = next(reader)
            except StopIteration:
                break
            if not fields:
                continue
            if not header:
                header = [name.strip() for name in fields]
                while header and not header[-1]:
                    header.pop()
                yield Line(raw.start, header)
            else:
                yield _fitted(raw, fields, len(header), delimiter)
    except csv.Error as error:
        raise DataError(
            f"{path}: line {raw.start}: the row that begins there is quoted wrongly ({error}); write a quote "
            'inside a field twice (""), and put such a field in quotes'
        ) from None
    finally:
        csv.field_size_limit(before)
    if not header:
        raise DataError(f"{path}: contains no table")


def _fitted(raw: _Lines, fields: list[str], count: int, delimiter: str) -> Line:
    problem = None
    if any(field.strip() for field in fields[count:]):
        problem = "more fields than the header has: a text with the delimiter in it must be quoted"
    elif len(fields) < count:
        problem = "fewer fields than the header has"
    elif any('"' in field for field in fields) and not _row_pattern(delimiter).fullmatch("".join(raw.text)):
        problem = "a quote inside a field that is not quoted"
    return Line(raw.start, fields[:count], problem)


def _delimiter(header: str, default: str, remark: Remark) -> str:
    """Return the delimiter of a header: the default if it occurs, otherwise the most frequent one."""
    bare = re.sub(r'"[^"]*"', "", header)
    counts = {mark: bare.count(mark) for mark in DELIMITERS}
    most = max(DELIMITERS, key=lambda mark: counts[mark])
    if counts[default] or not counts[most]:
        return default
    remark(f"the table is separated by {NAMES[most]}")
    return most


@cache
def _row_pattern(delimiter: str) -> re.Pattern[str]:
    """Return a row that has quotes only around whole fields, and doubled inside them."""
    mark = re.escape(delimiter)
    field = rf'(?:"(?:[^"]|"")*"|[^"\r\n{mark}]*)'
    return re.compile(rf"{field}(?:{mark}{field})*[\r\n]*")


class _Lines:
    """The lines of a file, together with those of the row that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._ahead: str | None = None
        self._count = 0
        self.start = 1
        self.text: list[str] = []

    def peek(self, path: Path) -> str:
        """Peek at the next line."""
        self._ahead = self._file.readline(MOST_HEADER)
        if len(self._ahead) == MOST_HEADER:
            raise DataError(f"{path}: its first line has more than {MOST_HEADER:,} characters; it is no table")
        return self._ahead

    def begin(self) -> None:
        self.start = self._count + 1
        self.text = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, self._ahead = (self._file.readline(MOST_FIELD) if self._ahead is None else self._ahead), None
        if not line:
            raise StopIteration
        self._count += 1
        self.text.append(line)
        return line
