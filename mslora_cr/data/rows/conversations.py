"""Reads conversations in the forms of ShareGPT and of chat messages, and other lists of JSON objects: rows of a table,
OmniMedVQA's questions."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from mslora_cr.data.json_list import MAX_RECORD_BYTES, TOO_LONG, ListReader
from mslora_cr.data.records import IMAGE, DataError
from mslora_cr.data.rows.row import (
    Columns,
    Problem,
    Remark,
    Row,
    UnusableError,
    attribute,
    images_of,
    known_columns,
    options_of,
    patient_column,
    patient_of,
    plain,
    remark_split,
    said,
    split_of,
    table_row,
)
from mslora_cr.utils.errors import shorten
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import STRICT_JSON, explain_json

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
OMNIMED = frozenset({"image_path", "question", "gt_answer", "option_A"})
OMNIMED_ATTRIBUTES = ("dataset", "modality_type", "question_type")
SYSTEM = "a system text, for which the published template has no place"
SYSTEMS = ("system", "developer")
TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image", "image_url", "input_image")
"""Kinds of the parts of a message: as Hugging Face's processors and OpenAI's servers call them."""


def read_json_rows(path: Path, columns: Columns, question: str | None, remark: Remark) -> Iterator[Row | Problem]:
    """Yield the records of a .json list or of .jsonl lines, whichever of the known forms each has.

    Raises:
        DataError: It cannot be read, or is no such file.
    """
    try:
        with check_regular(path).open("rb") as file:
            items = _lines(path, file) if path.suffix.lower() == ".jsonl" else _elements(path, file)
            for number, item in enumerate(items):
                location = f"{path.name}: record {number}"
                try:
                    yield _record(path, location, item, columns, question, remark)
                except UnusableError as error:
                    yield str(error), location
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _elements(path: Path, file: BinaryIO) -> Iterator[Any]:
    for *_, value in ListReader(path, file, hashlib.sha256()).items():
        yield value


def _lines(path: Path, file: BinaryIO) -> Iterator[Any]:
    """Yield the content of each line. Only a line feed ends a line: a text may contain other separators."""
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            raise DataError(f"{path}: line {number}: {TOO_LONG}")
        if not line.strip():
            continue
        try:
            yield STRICT_JSON.decode(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: {explain_json(error)}") from None


def _record(
    path: Path, location: str, item: Any, columns: Columns, question: str | None, remark: Remark
) -> Row | Problem:
    if not isinstance(item, Mapping):
        return "a record that is no object", location
    if item.keys() >= OMNIMED:
        return _omnimed(location, item)
    said_here = item.get("conversations", item.get("messages"))
    if said_here is None and _is_flat([str(name) for name in item], columns, question):
        matched = known_columns(path, [str(name) for name in item], columns, question, remark)
        return table_row(location, item, matched, question)
    return _conversation(location, item, said_here, columns, remark)


def _is_flat(names: Sequence[str], columns: Columns, question: str | None) -> bool:
    """Return whether an object has the columns of a table's row."""
    needed = [columns.answer, *([] if question else [columns.question or ""])]
    return {*map(plain, needed)} <= {*map(plain, names)}


def _omnimed(location: str, item: Mapping[str, Any]) -> Row | Problem:
    """Return a question of OmniMedVQA: the true answer is the text of an option."""
    options = options_of([[item[key]] for key in sorted(item) if key.startswith("option_")])
    attributes = {name: value for name in OMNIMED_ATTRIBUTES if (value := attribute(item.get(name))) is not None}
    turns = (("human", said(item["question"], "a question")), ("gpt", said(item["gt_answer"], "an answer")))
    if not all(text for _, text in turns):
        return "an empty turn", location
    return Row(
        location, images_of(item["image_path"]), turns, answer_type="CLOSED", attributes=attributes, options=options
    )


def _conversation(
    location: str, item: Mapping[str, Any], said_here: Any, columns: Columns, remark: Remark
) -> Row | Problem:
    if not isinstance(said_here, list):
        return "no list of conversations", location
    turns, dropped, marks, inline = [], set(), [], []
    if isinstance(item.get("system"), str) and item["system"].strip():
        dropped.add(SYSTEM)
    for turn in said_here:
        if not isinstance(turn, Mapping):
            return "a turn that is no object", location
        speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker in SYSTEMS:
            dropped.add(SYSTEM)
            continue
        if not isinstance(speaker, str) or speaker not in SPEAKERS or not isinstance(content, str | list):
            return "a turn without a known speaker and a text", location
        text, images, others = _content(content)
        if others and SPEAKERS[speaker] == "human":
            return f"a part of a question that is neither text nor picture ({others[0]})", location
        dropped.update(f"a part of an answer that is no text ({kind})" for kind in others)
        inline += images
        marks.append(text)
        turns.append((SPEAKERS[speaker], text.replace(IMAGE, "").strip()))
    if [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        return "turns that do not alternate from a question to an answer", location
    if not all(text for _, text in turns):
        return "an empty turn", location
    if any(IMAGE in text for text in marks[1:]):
        return "a picture that is shown with a later turn: all pictures stand before the first question here", location
    if _inside(marks[0]):
        dropped.add("the place of pictures inside a question: they are all shown before it")
    beside = images_of(item.get(columns.image) or item.get("images"))
    if inline and (beside or len(inline) < sum(text.count(IMAGE) for text in marks)):
        return "pictures both inside the turns and beside them", location
    row = Row(location, tuple(inline) or beside, tuple(turns), dropped=tuple(sorted(dropped)))
    return _completed(row, item, columns, remark) if row.images else ("no image", location)


def _content(content: str | list[Any]) -> tuple[str, list[str | bytes], list[str]]:
    """Return a message's text, with a mark where a picture stands; the pictures in it; and the kinds of its other
    parts."""
    if isinstance(content, str):
        return content, [], []
    texts: list[str] = []
    pictures: list[str | bytes] = []
    others: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if kind in PICTURES:
            texts.append(IMAGE)
            pictures += _picture(part)
        elif kind in TEXTS and isinstance(text := part if isinstance(part, str) else part.get("text"), str):
            texts.append(text)
        else:
            others.append(shorten(kind))
    return "\n".join(texts), pictures, others


def _picture(part: Mapping[str, Any]) -> tuple[str | bytes, ...]:
    """Return the picture in a part; none where the part only marks the place of one beside the messages."""
    held = next((value for key in (*PICTURES, "url", "path") if (value := part.get(key))), None)
    return images_of(held["url"] if isinstance(held, Mapping) and "url" in held else held)


def _inside(question: str) -> bool:
    """Return whether a picture is marked between words, or after them among others."""
    around = [part.strip() for part in question.split(IMAGE)]
    return any(around[1:-1]) or bool(around[0] and around[-1] and len(around) > 1)


def _completed(row: Row, item: Mapping[str, Any], columns: Columns, remark: Remark) -> Row:
    """Return the conversation with split, patient and attributes."""
    split = split_of(said(item[columns.split], "a split")) if columns.split and columns.split in item else None
    names = [str(name) for name in item]
    if not columns.split:
        remark_split(names, remark)
    column = columns.group or patient_column(names, remark)
    group = patient_of(item.get(column)) if column else None
    attributes = {name: value for name in columns.attributes if (value := attribute(item.get(name))) is not None}
    return replace(row, split=split, group=group, attributes=attributes)


def opening_key(path: Path) -> str:
    """Return the first non-space character of a JSON file: `[` for a list, `{` for an object."""
    with check_regular(path).open("rb") as file:
        start = file.read(1 << 16)
    return io.BytesIO(start).read().decode("utf-8-sig", errors="replace").lstrip()[:1]
