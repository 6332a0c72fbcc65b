"""A question about images as found in a source, the columns that hold it, and the meaning of a value."""

from __future__ import annotations

import base64
import binascii
import datetime
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from mslora_cr.data.answers.options import lettered
from mslora_cr.data.records import IMAGE, DataError
from mslora_cr.utils.errors import nearest, shorten
from mslora_cr.utils.walk import composed

SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing", "eval"), "test")
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
"""Names of a split, and its name here."""
PATIENTS = frozenset({"patient", "patientid", "subject", "subjectid"})
"""Columns that name the patient, if no other is given; without case, spaces, dots, dashes and underscores."""
PERHAPS_SPLITS = frozenset({"split", "subset", "fold", "partition", "set", "phase"})
"""Columns that may say which rows are for testing."""
PERHAPS_PATIENTS = ("patient", "subject", "case", "study", "participant", "mrn")
"""A column whose name begins or ends with one of these may name the patient."""
LETTERS = "ABCDEFGHIJ"
MOST_NAME = 1_000
"""The most characters in the name of an image; a longer text is something else."""
MAX_IMAGE_BYTES = 64 << 20
MOST_ROWS = 3_000_000
"""The most rows of one source."""
_DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.IGNORECASE)
_BASE64 = ("iVBOR", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")
"""The beginnings of PNG, JPEG, GIF, WebP, TIFF and BMP in base64."""
_SHORTEST_BASE64 = 64
_NO_TEXT: tuple[tuple[Any, str], ...] = (
    ((list, tuple), "a list"),
    (Mapping, "an object"),
    (bytes, "bytes"),
    ((datetime.date, datetime.time, datetime.timedelta), "a date or a time"),
)


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what; None: it has none, or for `group` one of `PATIENTS`.

    Attributes:
        attributes: Columns that become a question's attributes, under their own names.
        options: Columns with one option each, or one column with all options.
    """

    image: str = "image"
    question: str | None = "question"
    answer: str = "answer"
    group: str | None = None
    split: str | None = None
    answer_type: str | None = None
    attributes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A conversation about images, as it was found.

    Attributes:
        location: The location in words.
        images: Names of image files, or their bytes.
        turns: (speaker, text), alternating, the first of them human.
        split: `train`, `test` or `validation`, where the source says so.
        group: The patient or another owner of the images; rows of one group stay on one side of the split.
        answer_type: `OPEN`, `CLOSED`, or None: by its answer.
        attributes: Attributes of the patient and the image.
        options: The answers that the question offers, by letter.
        dropped: The parts that are left out of a row that stays, by reason.
    """

    location: str
    images: tuple[str | bytes, ...]
    turns: tuple[tuple[str, str], ...]
    split: str | None = None
    group: str | None = None
    answer_type: str | None = None
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


Problem = tuple[str, str]
"""Why a row is left out, and its location."""
Remark = Callable[[str], None]
"""Called with remarks on a source as a whole."""


class UnusableError(ValueError):
    """A value that cannot be used; the message is the reason for leaving out its row."""


def plain(name: str) -> str:
    """Return a column's name without case, spaces, marks and its Unicode form: `Patient ID` and `patient_id` are
    equal."""
    return re.sub(r"[\s._-]+", "", composed(name)).casefold()


def known_columns(path: Path, names: Sequence[str], columns: Columns, question: str | None, remark: Remark) -> Columns:
    """Return the columns by the names that a table gives them.

    Raises:
        DataError: The table lacks one, has two of a name, or several that could be meant.
    """
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise DataError(f"{path}: two columns are called {shorten(twice[0])}; give each a name of its own")

    def column(name: str, key: str) -> str:
        return _column(path, names, name, key, remark)

    def given(name: str | None, key: str) -> str | None:
        return column(name, key) if name else None

    matched = Columns(
        image=column(columns.image, "image"),
        question=None if question else given(columns.question, "question"),
        answer=column(columns.answer, "answer"),
        group=given(columns.group, "group"),
        split=given(columns.split, "split"),
        answer_type=given(columns.answer_type, "answer_type"),
        attributes=tuple(column(name, "attributes") for name in columns.attributes),
        options=tuple(column(name, "options") for name in columns.options),
    )
    if not matched.options:
        matched = replace(matched, options=_lettered_columns(names))
    if not matched.split:
        remark_split(names, remark)
    return matched if matched.group else replace(matched, group=patient_column(names, remark))


def _column(path: Path, names: Sequence[str], name: str, key: str, remark: Remark) -> str:
    alike = [other for other in names if plain(other) == plain(name)]
    option = "--" + key.replace("_", "-")
    if name in names:
        if len(alike) > 1:
            others = ", ".join(shorten(other) for other in alike if other != name)
            remark(f"column {shorten(name)} is read, though {others} could be meant as well; name one with {option}")
        return name
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise DataError(f"{path}: columns {', '.join(map(repr, alike))} could be meant; name one with {option}")
    hint = " or --ask TEXT, which asks the same of every image" if key == "question" else ""
    listing = ", ".join(shorten(other) for other in names[:40]) or "none"
    raise DataError(
        f"{path}: no column {name!r}{nearest(name, names)}; it has {listing}. Name the column with {option}{hint}"
    )


def _lettered_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Return columns A, B, C, … with one option each, as in VLMEvalKit's tables; none unless there are at least two."""
    letters = []
    for letter in LETTERS:
        if letter not in names:
            break
        letters.append(letter)
    return tuple(letters) if len(letters) > 1 else ()


def remark_split(names: Iterable[str], remark: Remark) -> None:
    """Remark on an unused column that may say which rows are for testing."""
    if likely := next((name for name in names if plain(name) in PERHAPS_SPLITS), None):
        remark(
            f"column {shorten(likely)} may say which rows are for training and for testing, but is not used. If it "
            "does, name it with --split"
        )


def patient_column(names: Iterable[str], remark: Remark = lambda text: None) -> str | None:
    """Return the column that names the patient; remark on one that only may."""
    names = list(names)
    if patients := [name for name in names if plain(name) in PATIENTS]:
        if patients[1:]:
            others = ", ".join(map(shorten, patients[1:]))
            remark(f"column {shorten(patients[0])} names the patient, though {others} may as well; choose with --group")
        return patients[0]
    likely = [
        name for name in names if plain(name).startswith(PERHAPS_PATIENTS) or plain(name).endswith(PERHAPS_PATIENTS)
    ]
    if likely:
        remark(
            f"column {shorten(likely[0])} may say whose an image is, but is not used. If it does, name it with --group "
            "so that no patient is in training and in testing"
        )
    return None


def table_row(location: str, values: Mapping[str, Any], columns: Columns, question: str | None) -> Row | Problem:
    """Return one row of a table, from whatever source."""
    try:
        return _table_row(location, values, columns, question)
    except UnusableError as error:
        return str(error), location


def _table_row(location: str, values: Mapping[str, Any], columns: Columns, question: str | None) -> Row | Problem:
    def text(column: str | None, what: str) -> str:
        return said(values.get(column) if column else None, what).replace(IMAGE, "").strip()

    images = images_of(values.get(columns.image))
    if not images:
        return "no image", location
    asking = question or text(columns.question, "a question")
    answer = text(columns.answer, "an answer")
    if not asking or not answer:
        return "no question" if not asking else "no answer", location
    kind = text(columns.answer_type, "an answer type").upper() or None
    if kind not in (None, "OPEN", "CLOSED"):
        return "an answer type that is neither open nor closed", location
    split = split_of(text(columns.split, "a split")) if columns.split else None
    if "hint" in values and not question and (hint := said(values["hint"], "a hint").strip()):
        asking = f"{hint}\n{asking}"
    options = options_of([values.get(name) for name in columns.options])
    attributes = {name: value for name in columns.attributes if (value := attribute(values.get(name))) is not None}
    group = patient_of(values.get(columns.group)) if columns.group else None
    return Row(location, images, (("human", asking), ("gpt", answer)), split, group, kind, attributes, options)


def split_of(name: str) -> str:
    """Return `train`, `test` or `validation`.

    Raises:
        UnusableError: It is called something else.
    """
    if split := SPLITS.get(name.strip().casefold()):
        return split
    raise UnusableError(f"a split called {shorten(name)}")


def said(value: Any, what: str) -> str:
    """Return the text of a table's value; empty if it is missing (null, NaN, NaT).

    Raises:
        UnusableError: It is neither a text nor a number.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)) or type(value).__name__ == "NaTType":
        return ""
    if isinstance(value, str | bool | int | float | Decimal):
        return str(value)
    raise UnusableError(
        f"{what} that is {next((word for kind, word in _NO_TEXT if isinstance(value, kind)), 'no text')}"
    )


def patient_of(value: Any) -> str | None:
    """Return a patient's name; None if it is missing. A number is the same with and without `.0`, which a column with
    missing values adds.

    Raises:
        UnusableError: It is neither a text nor a number.
    """
    return re.sub(r"^(-?\d+)\.0+$", r"\1", said(value, "a patient").strip()) or None


def attribute(value: Any) -> str | int | float | None:
    """Return an attribute's value; None if nothing is known."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, datetime.date):
        return value.isoformat()
    text = said(value, "an attribute").strip()
    return _number(text) if re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", text) else text or None


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number


def options_of(values: Sequence[Any]) -> dict[str, str]:
    """Return the options of a row: a column each, or one column with a list or with texts between `|` or `;`."""
    if len(values) == 1 and isinstance(values[0], str):
        values = re.split(r"[|;]", values[0])
    elif len(values) == 1 and isinstance(values[0], list | tuple):
        values = values[0]
    texts = [text for value in values if (text := said(value, "an option").strip())]
    if not texts:
        return {}
    try:
        return lettered(texts)
    except ValueError as error:
        raise UnusableError(f"options: {error}") from None


def images_of(value: Any) -> tuple[str | bytes, ...]:
    """Return a name, bytes, a picture in base64, what `datasets` makes of an image ({bytes, path}), or a list of these.

    Raises:
        UnusableError: It is nested, too large, or none of these.
    """
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):
            raise UnusableError("images in lists of lists")
        return tuple(image for item in value for image in images_of(item))
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, str):
        value = decoded(value.strip())
    if isinstance(value, str) and len(value) > MOST_NAME:
        raise UnusableError(f"an image whose name has more than {MOST_NAME:,} characters and is no picture in base64")
    if isinstance(value, bytes) and len(value) > MAX_IMAGE_BYTES:
        raise UnusableError(f"an image of more than {MAX_IMAGE_BYTES >> 20} MB")
    if not isinstance(value, str | bytes):
        raise UnusableError("an image that is neither a name nor a picture")
    return (value,) if value else ()


def decoded(text: str) -> str | bytes:
    """Return the bytes of a picture in base64; any other text unchanged.

    Raises:
        UnusableError: It begins like a picture in base64, but is damaged.
    """
    body = text[match.end() :] if (match := _DATA_URL.match(text)) else text
    if not match and (len(text) < _SHORTEST_BASE64 or not text.startswith(_BASE64) or "." in text):
        return text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UnusableError("an image in base64 that is damaged") from None
