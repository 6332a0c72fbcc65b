"""The files of each repository that are used, and the questions their labels answer: one function per source.

A layout is a pattern over paths, so that a clone, an archive and a folder with several of them are read alike.
"""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError

from mslora_cr.data.records import AnswerType, DataError
from mslora_cr.data.sources.raw import RawData, RawFile, read
from mslora_cr.utils.errors import first_problem
from mslora_cr.utils.strict_json import JsonError, decode_json

DIAGNOSES = {
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic naevus",
    "vasc": "vascular lesion",
}
MALIGNANT = ("akiec", "bcc", "mel")
"""Classes that are cancers, or (actinic keratosis with Bowen's disease) their precursors."""
CELLS = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}
RANGES = ("1 to 10", "11 to 25", "26 to 50", "51 to 100", "more than 100")
UPPER = (10, 25, 50, 100)
MANY = 25


class Asked(NamedTuple):
    """A question about a picture: the kind, which has its wordings in the catalogue, and the values for them."""

    kind: str
    answer: str
    answer_type: AnswerType
    words: Mapping[str, str] = MappingProxyType({})
    """Values for `{…}` in the wordings."""
    attributes: Mapping[str, str | float] = MappingProxyType({})
    """Attributes of this question alone."""
    id: int | None = None
    """The source's own ID of the question."""
    split: str | None = None
    """The side of the split for this question, if the picture does not decide it."""


class Labelled(NamedTuple):
    """A picture with its questions.

    Attributes:
        file: The image file.
        name: The path below the data set's folder of images.
        group: The patient or the lesion; None stands for the image itself.
        split: The side of the source's own split, if it has one.
        attributes: The attributes of the image.
        questions: The questions about the image.
    """

    file: RawFile
    name: str
    group: str | None
    split: str | None
    attributes: dict[str, str | float]
    questions: Sequence[Asked]


USED = {
    "VQA-RAD": r"data/(?:trainset\.json|testset\.json|images/(synpic\d+\.jpg))",
    "CXP": r"dataset/(train|test)/(NORMAL|PNEUMONIA)/([^/]+\.jpe?g)",
    "HAM10000": r"data/(?:HAM10000_metadata\.csv|HAM10000_metadata_ext\.csv|images/(ISIC_\d+)\.jpg)",
    "BUSI": r"Dataset_BUSI_with_GT/(normal|benign|malignant)/([^/]+\.png)",
    "BCCD": r"BCCD/(?:ImageSets/Main/(?:trainval|test)\.txt|Annotations/([^/]+)\.xml|JPEGImages/([^/]+)\.jpg)",
    "nuclei": r"stage1_train/([0-9a-f]+)/(images|masks)/([^/]+)\.png",
}
"""The files of a repository that are used, by the end of their path."""


def used_files(source: str, raw: RawData) -> list[tuple[str, re.Match[str], RawFile]]:
    """Return the files of a raw download that a source uses: path below the repository, match and file, sorted by path.

    Raises:
        DataError: Two places hold the same path with other contents.
    """
    pattern = re.compile(rf"(?:^|/)({USED[source]})$")
    by_path: dict[str, tuple[re.Match[str], RawFile]] = {}
    for file in raw.files:
        if match := pattern.search(str(file.path)):
            path = match[1]
            if path in by_path and (by_path[path][1].size, file.size) != (file.size, by_path[path][1].size):
                raise DataError(
                    f"{source}: both {by_path[path][1].path} and {file.path} may be {path}; give one of them"
                )
            by_path[path] = match, file
    return [(path, *by_path[path]) for path in sorted(by_path)]


def labelled(source: str, raw: RawData) -> Iterator[Labelled]:
    """Return the pictures of a source with their questions; none where the raw download does not have it.

    Raises:
        DataError: A file of labels is missing or malformed.
    """
    files = used_files(source, raw)
    return _READERS[source](files) if files else iter(())


Files = Sequence[tuple[str, re.Match[str], RawFile]]


def _file(files: Files, path: str) -> RawFile:
    file = next((file for name, _, file in files if name == path), None)
    if file is None:
        raise DataError(f"{path}: not in the raw download, which has other files of this source")
    return file


class _RadRow(BaseModel):
    qid: int
    image_name: str
    image_organ: str
    question: str
    answer: str | int | float
    answer_type: str
    question_type: str
    phrase_type: str


def _vqa_rad(files: Files) -> Iterator[Labelled]:
    organs = {"ABD": "abdomen", "CHEST": "chest", "HEAD": "head"}
    asked: dict[str, list[Asked]] = {}
    organ: dict[str, str] = {}
    for side in ("train", "test"):
        file = _file(files, f"data/{side}set.json")
        try:
            rows = TypeAdapter(list[_RadRow]).validate_python(decode_json(read(file)))
        except (ValidationError, JsonError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise DataError(f"{file.path}: {problem}") from None
        for row in rows:
            organ[row.image_name] = organs.get(row.image_organ, row.image_organ.lower())
            kind: AnswerType = "CLOSED" if row.answer_type.strip().upper() == "CLOSED" else "OPEN"
            about: dict[str, str | float] = {"question type": row.question_type, "phrase": row.phrase_type}
            words = {"question": row.question.strip()}
            question = Asked("question", str(row.answer).strip(), kind, words, about, row.qid, side)
            asked.setdefault(row.image_name, []).append(question)
    images = {match[2]: file for _, match, file in files if match[2]}
    for name in sorted(asked.keys() & images.keys()):
        yield Labelled(images[name], name, None, None, {"organ": organ[name]}, asked[name])


def _cxp(files: Files) -> Iterator[Labelled]:
    for _, match, file in files:
        side, folder, name = match[2], match[3], match[4]
        finding = folder.lower()
        sick = "yes" if finding == "pneumonia" else "no"
        questions = [Asked("pneumonia", sick, "CLOSED"), Asked("finding", finding, "CLOSED")]
        number = re.match(r"(person\d+)_(bacteria|virus)_", name) or re.search(r"(IM-\d+)()", name)
        cause = {"bacteria": "bacterial", "virus": "viral"}.get(number[2] if number else "")
        if cause:
            questions.append(Asked("cause", cause, "CLOSED"))
        about: dict[str, str | float] = {"finding": finding, **({"cause": cause} if cause else {})}
        yield Labelled(file, f"{side}/{folder}/{name}", number[1] if number else None, side, about, questions)


def _ham(files: Files) -> Iterator[Labelled]:
    images = {match[2]: file for _, match, file in files if match[2]}
    rows = _table(
        _file(files, "data/HAM10000_metadata.csv"), ("image_id", "lesion_id", "dx", "age", "sex", "localization")
    )
    has_boxes = any(path == "data/HAM10000_metadata_ext.csv" for path, _, _ in files)
    boxes: dict[str, str] = {}
    if has_boxes:
        sides = ("left", "top", "right", "bottom")
        for row in _table(_file(files, "data/HAM10000_metadata_ext.csv"), ("image_id", *sides)):
            boxes[row["image_id"]] = " ".join(row[side] for side in sides)
    for row in rows:
        name, kind = row["image_id"], row["dx"]
        if name not in images:
            continue
        if kind not in DIAGNOSES:
            raise DataError(
                f"data/HAM10000_metadata.csv: {name}: unknown class {kind!r}; known: {', '.join(DIAGNOSES)}"
            )
        questions = [
            Asked("diagnosis", DIAGNOSES[kind], "OPEN"),
            Asked("malignant", "yes" if kind in MALIGNANT else "no", "CLOSED"),
        ]
        attributes = {"sex": row["sex"], "localisation": row["localization"], "diagnosis": DIAGNOSES[kind]}
        about: dict[str, str | float] = {
            key: value for key, value in attributes.items() if value and value != "unknown"
        }
        if row["age"]:
            about["age"] = float(row["age"])
        if name in boxes:
            about["box"] = boxes[name]
        yield Labelled(images[name], f"{name}.jpg", row["lesion_id"], None, about, questions)


def _table(file: RawFile, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read(file).decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file.path}: not a table in UTF-8 ({error})") from None
    for number, row in enumerate(rows, 2):
        if any(row.get(column) is None for column in columns):
            raise DataError(f"{file.path}: line {number}: expected the columns {', '.join(columns)}")
    return rows


def _busi(files: Files) -> Iterator[Labelled]:
    for _, match, file in files:
        kind, name = match[2], match[3]
        questions = [Asked("lesion", "no" if kind == "normal" else "yes", "CLOSED"), Asked("kind", kind, "CLOSED")]
        yield Labelled(file, f"{kind}/{name}", None, None, {"kind": kind}, questions)


def _bccd(files: Files) -> Iterator[Labelled]:
    sides: dict[str, str] = {}
    for side, listed in {"train": "trainval", "test": "test"}.items():
        names = read(_file(files, f"BCCD/ImageSets/Main/{listed}.txt")).decode("utf-8", "replace").split()
        sides |= dict.fromkeys(names, side)
    images = {match[3]: file for _, match, file in files if match[3]}
    for _, match, file in files:
        if not match[2] or match[2] not in images:
            continue
        counts = _cells(file)
        questions = []
        for cell, words in CELLS.items():
            filled = {"cell": words, "cells": f"{words}s"}
            about: dict[str, str | float] = {"cell": words}
            questions.append(Asked("presence", "yes" if counts[cell] else "no", "CLOSED", filled, about))
            questions.append(Asked("count", str(counts[cell]), "OPEN", filled, about))
        yield Labelled(images[match[2]], f"{match[2]}.jpg", None, sides.get(match[2], "train"), {}, questions)


def _cells(file: RawFile) -> Counter[str]:
    """Return how many boxes of each class a file in the form of PASCAL VOC has."""
    content = read(file)
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:  # entities may grow without end
        raise DataError(f"{file.path}: has a document type or entities; expected plain boxes")
    try:
        return Counter(item.findtext("name", "") for item in ElementTree.fromstring(content).iter("object"))
    except ElementTree.ParseError as error:
        raise DataError(f"{file.path}: not XML ({error})") from None


def _nuclei(files: Files) -> Iterator[Labelled]:
    masks = Counter(match[2] for _, match, _ in files if match[3] == "masks")
    for _, match, file in files:
        count = masks[match[2]]
        if match[3] != "images" or not count:
            continue
        band = next((index for index, most in enumerate(UPPER) if count <= most), len(UPPER))
        questions = [
            Asked("range", RANGES[band], "CLOSED", {"ranges": ", ".join(RANGES[:-1]) + f" or {RANGES[-1]}"}),
            Asked("many", "yes" if count > MANY else "no", "CLOSED", {"most": str(MANY)}),
        ]
        yield Labelled(file, f"{match[2]}.png", None, None, {"nuclei": float(count)}, questions)


_READERS: dict[str, Callable[[Files], Iterator[Labelled]]] = {
    "VQA-RAD": _vqa_rad,
    "CXP": _cxp,
    "HAM10000": _ham,
    "BUSI": _busi,
    "BCCD": _bccd,
    "nuclei": _nuclei,
}
