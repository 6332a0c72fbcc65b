"""Reads questions about images from common formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mslora_cr.data.records import DataError
from mslora_cr.data.rows.arrow import dataset_files, read_dataset_folder
from mslora_cr.data.rows.conversations import opening_key, read_json_rows
from mslora_cr.data.rows.folders import class_folders, read_class_folders, read_coco, read_voc, voc_files
from mslora_cr.data.rows.row import MOST_ROWS, Columns, Problem, Remark, Row
from mslora_cr.data.rows.tables import read_table

TABLES = (".csv", ".tsv")
LISTS = (".json", ".jsonl")


def read_rows(
    source: Path, columns: Columns, question: str | None, remark: Remark = lambda text: None
) -> Iterator[Row | Problem]:
    """Yield the rows of a table (.csv, .tsv), of conversations or questions (.json, .jsonl), of COCO's boxes (.json),
    or of a folder: a `datasets` data set, PASCAL-VOC's boxes, images in folders named by class.

    Args:
        columns: The content of each column.
        question: The question about every image, where no column holds one.
        remark: Called with remarks about the source as a whole.

    Raises:
        DataError: The source is none of these, lacks a column, or has more than `MOST_ROWS` rows.
    """
    for number, row in enumerate(_rows_of(source, columns, question, remark), 1):
        if number > MOST_ROWS:
            raise DataError(f"{source}: more than {MOST_ROWS:,} rows; convert it in parts")
        yield row


def _rows_of(source: Path, columns: Columns, question: str | None, remark: Remark) -> Iterator[Row | Problem]:
    suffix = source.suffix.lower()
    if source.is_dir():
        yield from _folder(source, columns, question, remark)
    elif suffix in TABLES:
        yield from read_table(source, columns, question, remark)
    elif suffix == ".json" and opening_key(source) == "{":
        yield from read_coco(source)
    elif suffix in LISTS:
        yield from read_json_rows(source, columns, question, remark)
    else:
        raise DataError(
            f"{source}: expected a .csv, .tsv, .json or .jsonl file, or a folder of a datasets data set, of images in "
            "folders named by class, or of PASCAL-VOC's boxes"
        )


def _folder(source: Path, columns: Columns, question: str | None, remark: Remark) -> Iterator[Row | Problem]:
    if dataset_files(source):
        yield from read_dataset_folder(source, columns, question, remark)
    elif voc_files(source):
        yield from read_voc(source)
    elif class_folders(source):
        remark("the answers are the names of the folders that images are in")
        yield from read_class_folders(source, question)
    else:
        raise DataError(
            f"{source}: no .arrow or .parquet file, no PASCAL-VOC boxes, and no images in folders named by class"
        )


def holds_questions(source: Path) -> bool:
    """Return whether a folder has questions or labels, and not only images."""
    if dataset_files(source) or voc_files(source):
        return True
    classes = class_folders(source)
    return any(path.suffix.lower() not in (".dcm", ".dicom") for path in classes)
