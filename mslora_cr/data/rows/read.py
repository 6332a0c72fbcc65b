"""Questions about images, read from the forms that people keep them in: tables, ShareGPT, Hugging Face `datasets`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mslora_cr.data.records import IMAGE, DataError
from mslora_cr.utils.errors import nearest
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import STRICT_JSON, decode_json, explain_json

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
"""What a split is called → what it is here; the validation rows are left out."""
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
CLOSED_ANSWERS = frozenset({"yes", "no"})


PATIENT_COLUMNS = ("patient", "patient_id", "PatientID", "subject", "subject_id")
"""Columns that say whose an image is, where no other is given."""


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what; None: it has none, or for `group` one of `PATIENT_COLUMNS`."""

    image: str = "image"
    question: str | None = "question"
    answer: str = "answer"
    group: str | None = None
    split: str | None = None
    answer_type: str | None = None


@dataclass(frozen=True)
class Row:
    """A conversation about images, as it was found.

    Attributes:
        place: where, in words.
        images: names, or the bytes of image files.
        turns: (speaker, text), alternating; the first speaker is human.
        group: whose images these are; rows of one group stay on one side of the split.
        answer_type: `OPEN`, `CLOSED`, or None: by its answer.
    """

    place: str
    images: tuple[str | bytes, ...]
    turns: tuple[tuple[str, str], ...]
    split: str | None = None
    group: str | None = None
    answer_type: str | None = None


Problem = tuple[str, str]
"""Why a row is left out, and where it stands."""


def read_rows(source: Path, columns: Columns, question: str | None) -> Iterator[Row | Problem]:
    """The rows of a table (.csv, .tsv), a ShareGPT file (.json, .jsonl) or a folder of a `datasets` data set.

    Args:
        question: asked of every image, where no column holds a question.

    Raises:
        DataError: the source is none of these, or lacks a column.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        yield from _dataset_folder(source, columns, question)
    elif suffix in (".csv", ".tsv"):
        yield from _table(source, "\t" if suffix == ".tsv" else ",", columns, question)
    elif suffix in (".json", ".jsonl"):
        yield from _sharegpt(source, columns)
    else:
        raise DataError(f"{source}: expected a .csv, .tsv, .json or .jsonl file, or a folder of a datasets data set")


def _table(path: Path, delimiter: str, columns: Columns, question: str | None) -> Iterator[Row | Problem]:
    try:
        with check_regular(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = _known_columns(path, reader.fieldnames or (), columns, question)
            for values in reader:
                yield _row(f"{path.name}: line {reader.line_num}", values, columns, question)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table in UTF-8 ({error}); save it as CSV in UTF-8") from None


def _known_columns(file: Path, names: Sequence[str], columns: Columns, question: str | None) -> Columns:
    wanted = {"--image": columns.image, "--answer": columns.answer, "--group": columns.group}
    wanted |= {"--split": columns.split, "--answer-type": columns.answer_type}
    if question is None:
        wanted["--question"] = columns.question
    for option, name in wanted.items():
        if name is not None and name not in names:
            hint = " or --ask TEXT, which asks the same of every image" if option == "--question" else ""
            raise DataError(
                f"{file}: no column {name!r}{nearest(name, names)}; it has {', '.join(map(repr, names)) or 'none'}. "
                f"Name the column with {option}{hint}"
            )
    group = columns.group or next((name for name in PATIENT_COLUMNS if name in names), None)
    return replace(columns, group=group)


def _row(location: str, values: Mapping[str, Any], columns: Columns, question: str | None) -> Row | Problem:
    def text(column: str | None) -> str:
        value = values.get(column) if column else None
        return "" if value is None else str(value).replace(IMAGE, "").strip()

    asking, answer = question or text(columns.question), text(columns.answer)
    images = _images(values.get(columns.image))
    if not images:
        return "no image", location
    if not asking or not answer:
        return "no question" if not asking else "no answer", location
    kind = text(columns.answer_type).upper() or None
    if kind not in (None, "OPEN", "CLOSED"):
        return "an answer type that is neither open nor closed", location
    split = _split(text(columns.split)) if columns.split else None
    if split == "":
        return f"a split called {text(columns.split)!r}", location
    return Row(location, images, (("human", asking), ("gpt", answer)), split, text(columns.group) or None, kind)


def _split(name: str) -> str:
    return SPLITS.get(name.lower(), "")


def _images(value: Any) -> tuple[str | bytes, ...]:
    """A name, bytes, what `datasets` makes of an image ({bytes, path}), or a list of these."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list | tuple):
        return tuple(image for item in value for image in _images(item))
    if isinstance(value, str):
        value = value.strip()
    return (value,) if isinstance(value, str | bytes) and value else ()


def _sharegpt(path: Path, columns: Columns) -> Iterator[Row | Problem]:
    try:
        text = check_regular(path).read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            items = [STRICT_JSON.decode(line) for line in text.splitlines() if line.strip()]
        else:
            items = STRICT_JSON.decode(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {explain_json(error)}") from None
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list of conversations")
    for number, item in enumerate(items):
        yield _conversation(f"{path.name}: record {number}", item, columns)


def _conversation(location: str, item: Any, columns: Columns) -> Row | Problem:
    said = item.get("conversations", item.get("messages")) if isinstance(item, Mapping) else None
    if not isinstance(said, list):
        return "no list of conversations", location
    turns = []
    for turn in said:
        if not isinstance(turn, Mapping):
            return "a turn that is no object", location
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker == "system":
            continue
        if speaker not in SPEAKERS or not isinstance(text, str):
            return "a turn without a known speaker and a text", location
        turns.append((SPEAKERS[speaker], text.replace(IMAGE, "").strip()))
    if [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        return "turns that do not alternate from a question to an answer", location
    if not all(text for _, text in turns):
        return "an empty turn", location
    images = _images(item.get(columns.image, item.get("images")))
    if not images:
        return "no image", location
    split = _split(str(item[columns.split])) if columns.split and columns.split in item else None
    if split == "":
        return f"a split called {item[columns.split or '']!r}", location
    group = item.get(columns.group) if columns.group else None
    return Row(location, images, tuple(turns), split, None if group is None else str(group))


def _dataset_folder(folder: Path, columns: Columns, question: str | None) -> Iterator[Row | Problem]:
    """What `save_to_disk` wrote, or a repository of Parquet files; a split is known by its folder or file name."""
    import pyarrow
    from pyarrow import ipc, parquet

    files = sorted(file for pattern in ("*.arrow", "*.parquet") for file in folder.rglob(pattern) if file.is_file())
    files = [file for file in files if not file.name.startswith("cache-")]  # what `map` and `filter` leave
    if not files:
        raise DataError(f"{folder}: no .arrow or .parquet file; expected a folder that datasets' save_to_disk wrote")
    for file in files:
        location = file.relative_to(folder)
        named = [
            SPLITS[word] for part in location.parts for word in part.replace(".", "-").split("-") if word in SPLITS
        ]
        try:
            if file.suffix == ".parquet":
                opened = parquet.ParquetFile(file)
                schema, batches = opened.schema_arrow, opened.iter_batches(256)
            else:
                opened = ipc.open_stream(pyarrow.memory_map(str(file)))
                schema, batches = opened.schema, iter(opened)
            known = _known_columns(file, schema.names, columns, question)
            labels = _labels(schema)
            number = 0
            for batch in batches:
                for values in batch.to_pylist():
                    parsed = _row(f"{location}: row {number}", _named(values, labels), known, question)
                    number += 1
                    if isinstance(parsed, Row) and parsed.split is None and named:
                        parsed = replace(parsed, split=named[-1])
                    yield parsed
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from None


def _labels(schema: Any) -> dict[str, list[str]]:
    """The names of classes that columns hold the numbers of, from the note that `datasets` leaves in the schema."""
    note = decode_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = note.get("info", {}).get("features", {})
    return {name: kind["names"] for name, kind in features.items() if isinstance(kind, dict) and "names" in kind}


def _named(values: dict[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    for name, names in labels.items():
        number = values.get(name)
        if isinstance(number, int) and 0 <= number < len(names):
            values[name] = names[number]
    return values
