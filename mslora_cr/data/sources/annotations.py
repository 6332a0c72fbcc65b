"""Builds `train.json`, `test.jsonl` and, for a validation split, `val.jsonl` from a raw release.

One function per data set walks the release and yields rows. Questions about labels are the catalogue's own words, or
the user's. `slake-vqarad` is two releases, one after the other, as published.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from mslora_cr.data.records import AnswerType, DataError, Text
from mslora_cr.data.rows.row import attribute
from mslora_cr.data.rows.tables import table_lines
from mslora_cr.data.sources.catalog import DataSet
from mslora_cr.data.sources.pcam import has_split, image_name, read_labels, read_slides
from mslora_cr.data.sources.raw import RawData, RawFile, read, with_ending
from mslora_cr.utils.errors import first_problem, nearest
from mslora_cr.utils.files import replacing, write_text
from mslora_cr.utils.strict_json import STRICT_JSON, explain_json

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class Row(NamedTuple):
    """One question about one image; `image` is its name below the data set's folder."""

    split: Split
    id: int | str
    image: str
    question: str
    answer: str
    answer_type: AnswerType
    patient: str | None = None
    attributes: Mapping[str, str | int | float] = {}


def build_annotations(
    dataset: DataSet,
    raw: RawData,
    folder: Path,
    questions: Mapping[str, str] | None = None,
    unavailable: Collection[str] = (),
) -> Counter[str]:
    """Write `folder/train.json`, `folder/test.jsonl` and, where the release has a validation split, `folder/val.jsonl`;
    give the number of rows of each split.

    `questions` replaces templates of the catalogue, by their keys. Files that exist already are left
    alone if they say the same, and never overwritten otherwise. Rows without a question or an answer are left
    out, and counted under "empty"; so are rows of the images `unavailable`, under that word.

    Raises:
        DataError: The release holds nothing to build from or is malformed, or other annotations exist.
    """
    rows = annotation_rows(dataset, raw, questions)
    train, test = folder / "train.json", folder / "test.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(train) as new_train, replacing(test) as new_test:
        validation: list[str] = []
        counts = _write(rows, new_train, new_test, validation, unavailable)
        if not (counts["train"] and counts["test"]):
            raise DataError(
                f"{dataset.name}: the raw data give {counts['train']} training and {counts['test']} test rows"
            )
        for new, old in ((new_train, train), (new_test, test)):
            if old.exists() and not filecmp.cmp(new, old, shallow=False):
                raise DataError(f"{old}: differs from what would be built; move it away to rebuild it")
        if validation:
            _write_validation(folder / "val.jsonl", "".join(validation))
    return counts


def annotation_rows(dataset: DataSet, raw: RawData, questions: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Return every row that a release gives, as `build_annotations` writes them."""
    if dataset.name not in _BUILDERS:
        raise DataError(
            f"{dataset.name}: its raw release has nothing to build annotations from; "
            "fetch them with `mslora-cr data download`"
        )
    return _BUILDERS[dataset.name](raw, _templates(dataset, questions or {}))


def _templates(dataset: DataSet, replaced: Mapping[str, str]) -> dict[str, str]:
    for key in replaced:
        if key not in dataset.questions:
            keys = ", ".join(dataset.questions)
            raise DataError(f"{dataset.name}: no question {key!r}{nearest(key, dataset.questions)}; known: {keys}")
    return {**dataset.questions, **replaced}


def _write_validation(path: Path, text: str) -> None:
    if path.exists() and path.read_bytes() != text.encode():
        raise DataError(f"{path}: differs from what would be built; move it away to rebuild it")
    write_text(path, text)


def _write(
    rows: Iterator[Row], train: Path, test: Path, validation: list[str], unavailable: Collection[str]
) -> Counter[str]:
    """Write a record a line as the rows come; the few of validation are collected."""
    counts: Counter[str] = Counter()
    with train.open("w", encoding="utf-8") as train_file, test.open("w", encoding="utf-8") as test_file:
        for row in rows:
            if row.image in unavailable:
                counts["unavailable"] += 1
                continue
            if not (row.question.strip() and row.answer.strip()):
                counts["empty"] += 1
                continue
            if row.split == "train":
                train_file.write("[\n" if not counts["train"] else ",\n")
                train_file.write(json.dumps(_training_record(row), ensure_ascii=False))
            else:
                write = test_file.write if row.split == "test" else validation.append
                write(json.dumps(_test_record(row), ensure_ascii=False) + "\n")
            counts[row.split] += 1
        train_file.write("\n]\n")
    return counts


def _training_record(row: Row) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\n{row.question.strip()}"},
        {"from": "gpt", "value": row.answer.strip()},
    ]
    return {"id": row.id, "image": row.image, "conversations": turns, **_optional_fields(row)}


def _test_record(row: Row) -> dict[str, Any]:
    question, answer = row.question.strip(), row.answer.strip()
    return {
        "question_id": row.id,
        "image": row.image,
        "text": question,
        "gt": answer,
        "answer_type": row.answer_type,
        **_optional_fields(row),
    }


def _optional_fields(row: Row) -> dict[str, Any]:
    """Return the patient and attributes, as far as the release gives them."""
    patient = {"patient": row.patient} if row.patient else {}
    return {**patient, **({"attributes": dict(row.attributes)} if row.attributes else {})}


# --- releases with questions and answers ----------------------------------------

# Answers are text, but some releases contain numbers.
_Answer = Annotated[Text, BeforeValidator(lambda value: _said(value))]
_Question = Annotated[Text, BeforeValidator(lambda value: "" if value is None else value)]
_AnswerType = Annotated[
    AnswerType, BeforeValidator(lambda value: value.strip().upper() if isinstance(value, str) else value)
]


def _said(value: Any) -> Any:
    """Return an answer as text; null becomes empty, and its row is left out."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int | float) else value


class _PathVqaRow(BaseModel):
    image: Text
    question: _Question
    answer: _Answer


class _SlakeRow(BaseModel):
    img_name: Text
    question: _Question
    answer: _Answer
    answer_type: _AnswerType
    q_lang: str


class _VqaRadRow(BaseModel):
    image_name: Text
    question: _Question
    answer: _Answer
    answer_type: _AnswerType
    phrase_type: str


def _sides(validation: str, given: bool) -> Iterator[tuple[Split, str]]:
    """Yield the splits with a release's names for them; validation if it is `given`."""
    yield from zip(SPLITS, SPLITS, strict=True)
    if given:
        yield "validation", validation


def _pathvqa(raw: RawData, questions: Mapping[str, str]) -> Iterator[Row]:
    suffixes = (".pkl", ".json", ".jsonl")
    for split, side in _sides("val", raw.has(*(f"qas/val/val_qa{suffix}" for suffix in suffixes))):
        file = raw.find(*(f"qas/{side}/{side}_qa{suffix}" for suffix in suffixes))
        for index, row in enumerate(_rows(file, _PathVqaRow)):
            name = with_ending(row.image)
            closed = row.answer.strip().lower() in ("yes", "no")
            question = questions["question"].replace("{question}", row.question)
            yield Row(split, index, f"images/{side}/{name}", question, row.answer, "CLOSED" if closed else "OPEN")


def _slake_vqarad(raw: RawData, questions: Mapping[str, str]) -> Iterator[Row]:
    template = questions["question"]
    for split, side in _sides("validate", raw.has("Slake1.0/validate.json", "validate.json")):
        english = (
            row for row in _rows(raw.find(f"Slake1.0/{side}.json", f"{side}.json"), _SlakeRow) if row.q_lang == "en"
        )
        for number, slake in enumerate(english, 1):
            question = template.replace("{question}", slake.question)
            yield Row(split, number, f"Slake_images/{slake.img_name}", question, slake.answer, slake.answer_type)
    numbers: Counter[str] = Counter()
    for split, rad in _vqa_rad(raw):
        numbers[split] += 1
        question = template.replace("{question}", rad.question)
        yield Row(split, numbers[split], f"VqaRad_images/{rad.image_name}", question, rad.answer, rad.answer_type)


def _vqa_rad(raw: RawData) -> Iterator[tuple[Split, _VqaRadRow]]:
    """Yield VQA-RAD's rows with their side, from its own file or the two of github.com/Awenbocc/med-vqa."""
    if raw.named("trainset.json"):
        for split in SPLITS:
            for row in _rows(raw.find(f"data/{split}set.json", f"{split}set.json"), _VqaRadRow):
                yield split, row
        return
    for row in _rows(raw.find("VQA_RAD Dataset Public.json"), _VqaRadRow):
        yield ("test" if row.phrase_type.startswith("test") else "train"), row


# --- releases with labels -------------------------------------------------------


def _fitzpatrick(raw: RawData, questions: Mapping[str, str]) -> Iterator[Row]:
    columns = ("md5hash", "label", "three_partition_label")
    for row in _table(raw.find("fitzpatrick17k.csv"), columns):
        name, split = row["md5hash"], _split_by_hash(row["md5hash"])
        image = f"images/{with_ending(name)}"
        yield Row(split, f"{name}-diagnosis", image, questions["diagnosis"], row["label"], "OPEN")
        yield Row(
            split,
            f"{name}-malignancy",
            image,
            questions["malignancy"],
            row["three_partition_label"],
            "CLOSED",
        )


HAM_ATTRIBUTES = {"age": "age", "sex": "sex", "localization": "localisation"}
"""Columns of the metadata → names of attributes; a value of `unknown` is left out."""


def _ham(raw: RawData, questions: Mapping[str, str]) -> Iterator[Row]:
    file = raw.find("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
    for row in _table(file, ("lesion_id", "image_id", "dx"), tuple(HAM_ATTRIBUTES)):
        # The split is by lesion, so that no lesion appears both in training and in the test.
        split, image = _split_by_hash(row["lesion_id"]), f"images/{with_ending(row['image_id'])}"
        yield Row(
            split,
            row["image_id"],
            image,
            questions["label"],
            row["dx"],
            "CLOSED",
            row["lesion_id"],
            {
                name: value
                for column, name in HAM_ATTRIBUTES.items()
                if (value := attribute(row.get(column))) not in (None, "unknown")
            },
        )


def _cxp(raw: RawData, questions: Mapping[str, str]) -> Iterator[Row]:
    pattern = re.compile(r"(?:^|/)(train|test)/(NORMAL|PNEUMONIA)/([^/]+\.(?i:jpeg|jpg|png))$")
    # Kaggle's archive holds the whole tree twice.
    folders = sorted({match.groups() for file in raw.files if (match := pattern.search(str(file.path)))})
    numbers: Counter[str] = Counter()
    for folder, label, name in folders:
        split: Split = "train" if folder == "train" else "test"
        person = re.match(r"person\d+(?=_)", name)
        patient = f"{label.lower()} {person[0]}" if person else None
        image = f"{folder}/{label}/{name}"
        yield Row(split, numbers[folder], image, questions["label"], label.lower(), "CLOSED", patient)
        numbers[folder] += 1


def _pcam(raw: RawData, questions: Mapping[str, str]) -> Iterator[Row]:
    for split, side in _sides("valid", has_split(raw, "valid")):
        labels = read_labels(raw, side)
        for index, (positive, slide) in enumerate(zip(labels, read_slides(raw, side, len(labels)), strict=True)):
            answer = "Positive" if positive else "Negative"
            yield Row(split, index, image_name(side, index), questions["label"], answer, "CLOSED", slide)


_BUILDERS: dict[str, Callable[[RawData, Mapping[str, str]], Iterator[Row]]] = {
    "pathvqa": _pathvqa,
    "slake-vqarad": _slake_vqarad,
    "derm": _fitzpatrick,
    "PCAM": _pcam,
    "CXP": _cxp,
    "HAM": _ham,
}


def _split_by_hash(key: str) -> Split:
    """Take a fifth of all keys as test keys, the same ones whatever else is in the table."""
    return "test" if hashlib.sha256(key.encode()).digest()[0] < 256 / 5 else "train"


# --- reading tables -------------------------------------------------------------

_Model = TypeVar("_Model", bound=BaseModel)


def _rows(file: RawFile, model: type[_Model]) -> Iterator[_Model]:
    """Yield the objects of a JSON, JSONL or pickle file."""
    for location, value in _lines(file) if file.path.suffix == ".jsonl" else _items(file):
        try:
            yield model.model_validate(value)
        except ValidationError as error:
            raise DataError(f"{file.path}: {location}: {first_problem(error)}") from None


def _lines(file: RawFile) -> Iterator[tuple[str, Any]]:
    """Yield the value of each line of a JSONL file, with its location in words; blank lines are skipped."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                value = STRICT_JSON.decode(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file.path}: line {number}: {explain_json(error)}") from None
            yield f"line {number}", value


def _items(file: RawFile) -> Iterator[tuple[str, Any]]:
    """Yield the items of the list in a JSON or pickle file, each with its location in words."""
    values = _load(file)
    if not isinstance(values, list):
        raise DataError(f"{file.path}: expected a list, found {type(values).__name__}")
    for index, value in enumerate(values):
        yield f"record {index}", value


def _load(file: RawFile) -> Any:
    data = read(file)
    try:
        if file.path.suffix == ".pkl":
            return _PlainUnpickler(io.BytesIO(data)).load()
        return STRICT_JSON.decode(data.decode("utf-8-sig"))
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None
    except Exception as error:  # A damaged pickle may raise nearly anything.
        raise DataError(f"{file.path}: not readable as {file.path.suffix[1:]} ({error})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers only: nothing that a pickle names is ever imported or called."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"refused: this pickle wants to load {module}.{name}; only plain data is allowed")


def _text(file: RawFile) -> str:
    try:
        return read(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file.path}: not UTF-8 text") from None


def _table(file: RawFile, columns: tuple[str, ...], more: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """Yield rows of a table, with the columns that are needed, and others where there are any."""
    lines = table_lines(io.StringIO(_text(file), newline=""), Path(file.path), ",", lambda remark: None)
    names = list(next(lines).fields)
    if lacking := [column for column in columns if column not in names]:
        raise DataError(f"{file.path}: line 1: no column {', '.join(lacking)}")
    if twice := [column for column in (*columns, *more) if names.count(column) > 1]:
        raise DataError(f"{file.path}: line 1: two columns are called {twice[0]}")
    for line in lines:
        if line.problem:
            raise DataError(f"{file.path}: line {line.number}: {line.problem}")
        row = dict(zip(names, line.fields, strict=True))
        yield {column: row[column] for column in (*columns, *more) if column in row}
