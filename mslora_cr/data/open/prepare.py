"""`mslora-cr data prepare open --raw PATH`: repositories of the open stream become data sets that training reads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mslora_cr.data.open.catalog import PREPARED, OpenSource
from mslora_cr.data.open.layouts import Asked, Labelled, labelled
from mslora_cr.data.records import IMAGE, DataError, sample_of
from mslora_cr.data.sources.prepare import place_files
from mslora_cr.data.sources.raw import RawData, RawFile, fingerprint
from mslora_cr.utils.files import hidden_folder, replacing_folder, write_json

TEST_SHARE = 0.2
CORRECTED = {"VQA-RAD": "VQA-RAD-by-image", "CXP": "CXP-by-patient"}
"""Sources whose own split shares pictures or patients, and the name of the split that does not."""
Row = tuple[str, Labelled, Asked, str]
"""Side, picture, question, and the group."""


@dataclass
class PreparedSet:
    """A written data set: rows and images on each side, and what both sides share."""

    name: str
    rows: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    shared_images: int = 0
    shared_groups: int = 0
    test_rows_of_shared: int = 0

    def summary(self) -> dict[str, Any]:
        """Return the content of `prepared.json`."""
        sides = {side: {"rows": self.rows[side], "images": self.images[side]} for side in ("train", "test")}
        shared = {"images": self.shared_images, "groups": self.shared_groups, "test_rows": self.test_rows_of_shared}
        return {**sides, "on_both_sides": shared}


def prepare_open(
    sources: Sequence[OpenSource],
    raw: Sequence[Path],
    root: Path,
    copy: bool = False,
    progress: bool = False,
    most: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[PreparedSet], list[OpenSource]]:
    """Write a data set below `root` for each source that the raw download has; two where its own split is at fault.

    Args:
        raw: Clones and archives of the repositories, or folders that hold several.
        root: The data root. A folder that an earlier call wrote is replaced.
        copy: Copy images instead of linking them.
        most: The most rows of a side (`train`, `test`); a random sample, the same at every call. Without an entry a
            side keeps all of its rows.

    Returns:
        What was written, and the sources that are not there.

    Raises:
        DataError: None is there, labels are malformed, or a folder holds something else.
    """
    root.mkdir(parents=True, exist_ok=True)
    written: list[PreparedSet] = []
    missing: list[OpenSource] = []
    with hidden_folder(root / "open") as work, RawData(raw, work) as data:
        for source in sources:
            pictures = list(labelled(source.name, data))
            if not pictures:
                missing.append(source)
                continue
            groups = _groups(pictures)
            has_sides = all(_has_side(picture) for picture in pictures)
            if has_sides:
                rows = _as_published(pictures, groups)
                written.append(_write(root / source.name, source, _sampled(rows, most), copy, progress))
            if not has_sides or source.name in CORRECTED:
                rows = _drawn(source, pictures, groups)
                name = CORRECTED.get(source.name, source.name)
                written.append(_write(root / name, source, _sampled(rows, most), copy, progress))
    if not written:
        raise DataError(
            f"{', '.join(map(str, raw))}: nothing of the open stream there; give clones or archives of "
            f"{', '.join(source.repository for source in sources)}"
        )
    return written, missing


def wording(source: OpenSource, image: str, asked: Asked) -> str:
    """Return a question in one of its wordings, always the same one for a picture: by the SHA-256 of its name and the
    kind.
    """
    choices = source.wordings[asked.kind]
    number = int(hashlib.sha256(f"{image} {asked.kind}".encode()).hexdigest()[:8], 16)
    return choices[number % len(choices)].format_map(asked.words)


def on_test_side(source: str, group: str) -> bool:
    """Return whether a group is drawn for testing: the first 32 bits of the SHA-256 of `SOURCE/GROUP` as a fraction."""
    return int(hashlib.sha256(f"{source}/{group}".encode()).hexdigest()[:8], 16) < TEST_SHARE * 2**32


def _has_side(picture: Labelled) -> bool:
    return picture.split is not None or all(asked.split is not None for asked in picture.questions)


def _groups(pictures: Sequence[Labelled]) -> list[str]:
    """Return the group of each picture: the one that the source names, or else the picture itself with its copies under
    other names.
    """
    first: dict[tuple[object, ...], str] = {}
    return [picture.group or first.setdefault(fingerprint(picture.file), picture.name) for picture in pictures]


def _as_published(pictures: Sequence[Labelled], groups: Sequence[str]) -> Iterator[Row]:
    for picture, group in zip(pictures, groups, strict=True):
        for asked in picture.questions:
            yield asked.split or picture.split or "train", picture, asked, group


def _drawn(source: OpenSource, pictures: Sequence[Labelled], groups: Sequence[str]) -> Iterator[Row]:
    for picture, group in zip(pictures, groups, strict=True):
        side = "test" if on_test_side(source.name, group) else "train"
        for asked in picture.questions:
            yield side, picture, asked, group


def _sampled(rows: Iterator[Row], most: Mapping[str, int]) -> Iterator[Row]:
    """Yield at most so many rows of each side, in their order."""
    sides: dict[str, list[Row]] = {"train": [], "test": []}
    for row in rows:
        sides[row[0]].append(row)
    for side, of_side in sides.items():
        yield from (of_side[index] for index in sample_of(len(of_side), most.get(side, len(of_side))))


def _write(folder: Path, source: OpenSource, rows: Iterator[Row], copy: bool, progress: bool) -> PreparedSet:
    if folder.exists() and not (folder / PREPARED).is_file() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: already there, and not from data prepare open; choose another --root or move it away"
        )
    prepared, matches = PreparedSet(folder.name), dict[str, RawFile]()
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    names: dict[str, set[str]] = {"train": set(), "test": set()}
    owners: dict[str, list[str]] = {"train": [], "test": []}
    for side, picture, asked, group in rows:
        name = f"images/{picture.name}"
        matches[name] = picture.file
        names[side].add(name)
        owners[side].append(group)
        number = len(sides[side]) if asked.id is None else asked.id
        question = wording(source, picture.name, asked)
        if side == "train":
            sides[side].append(_training(number, name, question, asked))
        else:
            sides[side].append(_testing(number, name, question, picture, asked, group))
    for side, records in sides.items():
        if not records:
            raise DataError(
                f"{folder.name}: the {side} side is empty; the raw download holds a part of the source alone"
            )
    prepared.rows.update({side: len(records) for side, records in sides.items()})
    prepared.images.update({side: len(of_side) for side, of_side in names.items()})
    prepared.shared_images = len(names["train"] & names["test"])
    shared = set(owners["train"]) & set(owners["test"])
    prepared.shared_groups, prepared.test_rows_of_shared = len(shared), sum(owner in shared for owner in owners["test"])
    with replacing_folder(folder) as staging:
        write_json(staging / "train.json", sides["train"])
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in sides["test"])
        (staging / "test.jsonl").write_text("".join(lines), encoding="utf-8")
        place_files(matches, {name: staging / name for name in matches}, copy, progress)
        write_json(staging / PREPARED, {"repository": source.repository, "unit": source.unit, **prepared.summary()})
    return prepared


def _training(number: int, image: str, question: str, asked: Asked) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": asked.answer}]
    return {"id": str(number), "image": image, "conversations": turns}


def _testing(number: int, image: str, question: str, picture: Labelled, asked: Asked, group: str) -> dict[str, Any]:
    record = {
        "question_id": number,
        "image": image,
        "text": question,
        "gt": asked.answer,
        "answer_type": asked.answer_type,
    }
    attributes = {"question": asked.kind, **picture.attributes, **asked.attributes}
    return {**record, "patient": group, "attributes": attributes}
