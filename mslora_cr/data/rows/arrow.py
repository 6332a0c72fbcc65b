"""Reads what Hugging Face `datasets` wrote: folders of Arrow or Parquet files. Only the needed columns are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mslora_cr.data.records import DataError
from mslora_cr.data.rows.arrow_sizes import check_unpacked
from mslora_cr.data.rows.parquet_sizes import unpacked_bytes
from mslora_cr.data.rows.row import (
    MAX_IMAGE_BYTES,
    MOST_ROWS,
    SPLITS,
    Columns,
    Problem,
    Remark,
    Row,
    known_columns,
    table_row,
)
from mslora_cr.utils.errors import shorten
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import JsonError, decode_json
from mslora_cr.utils.walk import files_below

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (".arrow", ".parquet")
ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 256 << 20
"""The most bytes of rows that are decoded at once; each row may be as large as all values of its row group."""
MOST_GROUP_BYTES = 1 << 30
"""The most bytes of an unpacked Parquet row group, which must be held at once."""
MOST_ITEMS = 1_000
"""The most items in a list of one row, such as its images."""


def dataset_files(folder: Path) -> list[Path]:
    """Return the files of a data set below a folder, without those that `map` and `filter` leave."""
    return [file for file in files_below(folder) if file.suffix in ENDINGS and not file.name.startswith("cache-")]


def read_dataset_folder(
    folder: Path, columns: Columns, question: str | None, remark: Remark
) -> Iterator[Row | Problem]:
    """Yield the rows of a data set; names of files and folders tell the split.

    Raises:
        DataError: There is no such file, one cannot be read or lacks a column, or only some name a split.
    """
    import pyarrow

    files = dataset_files(folder)
    if not files:
        raise DataError(f"{folder}: no .arrow or .parquet file; expected a folder that datasets' save_to_disk wrote")
    splits = {file: split_in(file.relative_to(folder)) for file in files}
    if not columns.split and len({*splits.values()}) > 1 and None in splits.values():
        odd = next(file for file, split in splits.items() if split is None)
        raise DataError(f"{odd}: its name tells no split, unlike those of other files beside it; move or rename it")
    for file, split in splits.items():
        try:
            for row in _file_rows(file, str(file.relative_to(folder)), columns, question, remark):
                named = isinstance(row, Row) and row.split is None and split is not None
                yield replace(row, split=split) if named and isinstance(row, Row) else row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: cannot be read ({shorten(str(error))})") from None


def split_in(path: Path) -> str | None:
    """Return the split that a path names, as `datasets` finds it: a word between `-`, `_`, `.`, spaces or folders."""
    words = path.as_posix().casefold()
    for mark in "-_. /":
        words = words.replace(mark, "\n")
    named = [SPLITS[word] for word in words.split("\n") if word in SPLITS]
    return named[-1] if named else None


def _file_rows(
    file: Path, location: str, columns: Columns, question: str | None, remark: Remark
) -> Iterator[Row | Problem]:
    schema, batches, count = _opened(file)
    _check_count(file, count)
    matched = known_columns(file, schema.names, columns, question, remark)
    needed = [
        matched.image,
        matched.answer,
        matched.group,
        matched.split,
        matched.answer_type,
        *matched.attributes,
        *matched.options,
    ]
    needed += [] if question else [matched.question, "hint" if "hint" in schema.names else None]
    names = list(dict.fromkeys(name for name in needed if name))
    for name in names:
        _check_type(file, name, schema.field(name).type)
    labels, whole = _labels(file, schema), _whole_columns(file, names, schema)
    number = 0
    for batch in batches(names):
        _check_count(file, number + batch.num_rows)
        for values in _values(batch, file):
            where = f"{location}: row {number}"
            number += 1
            yield (
                table_row(where, _worded(values, labels, whole), matched, question)
                if isinstance(values, dict)
                else (values, where)
            )


def _check_count(file: Path, count: int) -> None:
    if count > MOST_ROWS:
        raise DataError(f"{file}: more than {MOST_ROWS:,} rows ({count:,}); write it as several files")


def _opened(file: Path) -> tuple[pyarrow.Schema, Any, int]:
    """Return the schema, batches of some columns, and the number of rows if the file states it."""
    import pyarrow
    from pyarrow import ipc, parquet

    check_regular(file)
    if file.suffix == ".arrow":
        source = pyarrow.memory_map(str(file))
        # The file format is a stream between a mark of 8 bytes and a footer, which may lie.
        start = 8 if source.read(6) == b"ARROW1" else 0
        source.seek(start)
        check_unpacked(file, source)
        source.seek(start)
        reader = ipc.open_stream(source)
        return reader.schema, lambda names: (batch.select(names) for batch in reader), 0
    opened = parquet.ParquetFile(file)

    def batches(names: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        largest = _largest_group(file, opened.metadata, names)
        # A dictionary stores a value once for many rows; its rows hold it once each.
        rows = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(largest, 1)))
        return opened.iter_batches(rows, columns=names, use_threads=False)

    return opened.schema_arrow, batches, opened.metadata.num_rows


def _largest_group(file: Path, metadata: Any, names: Sequence[str]) -> int:
    """Return the bytes of the largest row group of some columns, unpacked."""
    largest = 0
    with file.open("rb") as content, mmap(content.fileno(), 0, access=ACCESS_READ) as data:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            parts = [group.column(index) for index in range(group.num_columns)]
            size = sum(_unpacked(data, part) for part in parts if part.path_in_schema.split(".")[0] in names)
            if size > MOST_GROUP_BYTES:
                raise DataError(
                    f"{file}: row group {number} unpacks to {size:,} bytes, more than {MOST_GROUP_BYTES:,}; write it "
                    "with smaller row groups"
                )
            largest = max(largest, size)
    return largest


def _unpacked(data: mmap, part: Any) -> int:
    """Return the bytes of a column chunk, unpacked: as the footer says, or more if its pages say so."""
    start = min(part.data_page_offset, part.dictionary_page_offset or part.data_page_offset)
    return max(part.total_uncompressed_size, unpacked_bytes(data, start, part.total_compressed_size))


def _check_type(file: Path, name: str, kind: Any) -> None:
    """Check that a column holds texts, numbers, dates, bytes, images, or lists of these, and nothing nested deeper."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    inner = [kind.field(index).type for index in range(kind.num_fields)] if types.is_struct(kind) else [kind]
    if any(types.is_nested(part) for part in inner):
        raise DataError(f"{file}: column {shorten(name)} is nested too deeply ({shorten(str(kind))})")


def _values(batch: pyarrow.RecordBatch, file: Path) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch; the reason where Python cannot represent a value (a date before year 1, bytes that are
    not text).
    """
    largest = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if (size := _largest(column)) > MAX_IMAGE_BYTES:
            raise DataError(f"{file}: column {shorten(name)} holds a value of {size:,} bytes, too large for a picture")
        largest += size
    count = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(largest, 1)))
    for start in range(0, batch.num_rows, count):
        some = batch.slice(start, count)
        try:
            yield from some.to_pylist()
        except (ValueError, OverflowError, TypeError):
            yield from (_one(some.slice(index, 1)) for index in range(some.num_rows))


def _one(batch: pyarrow.RecordBatch) -> dict[str, Any] | str:
    try:
        [values] = batch.to_pylist()
    except UnicodeDecodeError:
        return "a text that is not UTF-8"
    except (ValueError, OverflowError, TypeError):
        return "a value that Python cannot hold, such as a date before the year 1"
    return dict(values)


def _largest(column: Any) -> int:
    """Return the bytes of the largest text or picture of a column, lists counted by their items."""
    from pyarrow import compute, types

    kind = column.type
    if types.is_dictionary(kind):
        return _largest(column.dictionary)
    if types.is_struct(kind):
        return max((_largest(column.field(index)) for index in range(kind.num_fields)), default=0)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        most = compute.max(compute.list_value_length(column)).as_py() or 0
        return MAX_IMAGE_BYTES + 1 if most > MOST_ITEMS else _largest(column.flatten())
    if any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)):
        return compute.max(compute.binary_length(column)).as_py() or 0
    return 0


def _whole_columns(file: Path, names: Sequence[str], schema: pyarrow.Schema) -> set[str]:
    """Return columns of floating point whose values are all whole: integers with gaps, which are written as 2.0."""
    from pyarrow import types

    floats = [name for name in names if types.is_floating(schema.field(name).type)]
    if not floats:
        return set()
    whole = set(floats)
    _, batches, _ = _opened(file)
    for batch in batches(floats):
        for name in tuple(whole):
            values = batch.column(batch.schema.get_field_index(name)).to_numpy(zero_copy_only=False)
            finite = values[values == values]
            if not (finite == finite.round()).all() or (abs(finite) > 2**53).any():
                whole.discard(name)
    return whole


def _labels(file: Path, schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Return the names of classes for columns of class numbers, from the note that `datasets` leaves in the schema."""
    try:
        note = decode_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    except JsonError as error:
        raise DataError(f"{file}: the note of datasets in its schema is {error}") from None
    for key in ("info", "features"):
        note = note.get(key, {}) if isinstance(note, Mapping) else {}
    if not isinstance(note, Mapping):
        return {}
    kinds = {name: kind["names"] for name, kind in note.items() if isinstance(kind, Mapping) and kind.get("names")}
    for name, names in kinds.items():
        if not isinstance(names, list) or not all(isinstance(text, str) for text in names):
            raise DataError(f"{file}: the names of the classes of column {shorten(name)} are not a list of texts")
    return kinds


def _worded(values: dict[str, Any], labels: Mapping[str, list[str]], whole: set[str]) -> dict[str, Any]:
    """Return class numbers as their names (-1, which means none, as nothing), and whole numbers as integers."""
    for name, names in labels.items():
        number = values.get(name)
        if isinstance(number, int):
            values[name] = names[number] if 0 <= number < len(names) else None
    for name in whole:
        number = values.get(name)
        if isinstance(number, float) and number == number:
            values[name] = int(number)
    return values
