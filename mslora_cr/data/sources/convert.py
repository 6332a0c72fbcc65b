"""`mslora-cr data convert`: people's own tables, conversations and image files into the layout that training reads."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mslora_cr.data.images import check_name
from mslora_cr.data.records import IMAGE, DataError
from mslora_cr.data.rows.read import CLOSED_ANSWERS, Columns, Row, read_rows
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.dicom import is_dicom
from mslora_cr.data.sources.nifti import is_nifti
from mslora_cr.data.sources.rendering import Note, Rendering
from mslora_cr.utils.files import replace_folder, write_json

REPORT = "convert.json"
EXAMPLES = 5
"""How many rows are named for each reason to leave rows out."""
IMAGES = "images"


@dataclass(frozen=True)
class Split:
    """How rows without a split of their own are parted: whole groups, drawn by the seed, until the test side has this
    share of the rows."""

    test_share: float = 0.2
    seed: int = 0


@dataclass
class Converted:
    """What a conversion made and left out.

    Attributes:
        grouped_by: what keeps rows on one side of the split.
        left_out: by reason, the rows (the first few by name).
        shared_groups: groups that the source's own split has on both sides.
        noted: how files were drawn, where it is worth knowing: by what is to be said, the files.
        several: how many rows have several pictures.
        most_images: that a row has.
    """

    rows: int = 0
    train: int = 0
    test: int = 0
    images: int = 0
    grouped_by: str = "image"
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    shared_groups: list[str] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    several: int = 0
    most_images: int = 0

    def note(self, path: Path) -> Note:
        """What to call with how a file was drawn; each remark on it counts once."""

        def add(text: str) -> None:
            if self.noted[text][-1:] != [str(path)]:
                self.noted[text].append(str(path))

        return add

    def summary(self) -> dict[str, Any]:
        """What `convert.json` holds."""
        left_out, noted = (
            {reason: {"count": len(places), "examples": places[:EXAMPLES]} for reason, places in kind.items()}
            for kind in (self.left_out, self.noted)
        )
        counts = {"rows": self.rows, "train": self.train, "test": self.test, "images": self.images}
        shared = {"count": len(self.shared_groups), "examples": self.shared_groups[:EXAMPLES]}
        found = {"groups_on_both_sides": shared, "left_out": left_out, "noted": noted}
        return {**counts, "rows_with_several_images": self.several, "grouped_by": self.grouped_by, **found}


def convert(
    source: Path,
    output: Path,
    columns: Columns | None = None,
    question: str | None = None,
    image_root: Path | None = None,
    rendering: Rendering | None = None,
    split: Split | None = None,
    closed: bool = False,
    progress: bool = False,
) -> Converted:
    """Write `train.json`, `test.jsonl`, `images/` and `convert.json` of a data set into a folder, whole or not at all.

    Args:
        output: the data set's folder; one that an earlier call made is replaced.
        question: asked of every image, where no column holds a question.
        image_root: where image names start; the source's folder if not given.
        closed: whether all questions are closed; else those are whose answer is yes or no, and those that a column
            says.

    Raises:
        DataError: the source cannot be read, nothing of it can be used, one side of the split is empty, or the output
            folder is not from an earlier call.
    """
    columns, rendering, split = columns or Columns(), rendering or Rendering(), split or Split()
    _check_output(output)
    converted = Converted()
    rows = list(_usable(read_rows(source, columns, question), converted))
    converted.grouped_by = (columns.group or "patient") if any(row.group for row in rows) else "image"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        staging = Path(folder) / output.name
        (staging / IMAGES).mkdir(parents=True)
        writer = _Images(image_root or (source if source.is_dir() else source.parent), staging, rendering, converted)
        bar = tqdm(rows, "images", unit="row", disable=not progress)
        placed = [(row, names) for row in bar if (names := writer.place(row))]
        converted.images, converted.several = writer.count, sum(len(names) > 1 for _, names in placed)
        converted.most_images = max((len(names) for _, names in placed), default=0)
        train, test = _parted(placed, split, converted)
        _write(staging, train, test, closed)
        converted.train, converted.test = len(train), len(test)
        later = [row.place for row, _ in test if len(row.turns) > 2]
        if later:
            converted.left_out["the later questions of a conversation on the test side"] = later
        write_json(staging / REPORT, {"source": str(source), **converted.summary()})
        replace_folder(staging, output)
    return converted


def holds_questions(source: Path) -> bool:
    """Whether a source has questions, and not images alone.

    Raises:
        DataError: there is no such file or folder.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_dir():
        return any(any(source.rglob(pattern)) for pattern in ("*.arrow", "*.parquet"))
    return not (is_dicom(source) or is_nifti(source))


def convert_images(source: Path, output: Path, rendering: Rendering | None = None, progress: bool = False) -> Converted:
    """Write the pictures of a DICOM or NIfTI file, or of all below a folder, as PNG into a folder, in the same tree.

    Raises:
        DataError: there is none, or the output folder is not from an earlier call.
    """
    _check_output(output)
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    files = [path for path in files if is_dicom(path) or is_nifti(path)]
    if not files:
        raise DataError(f"{source}: no DICOM or NIfTI file there")
    converted, root = Converted(rows=len(files)), source if source.is_dir() else source.parent
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        staging = Path(folder) / output.name
        staging.mkdir()
        for path in tqdm(files, "images", unit="file", disable=not progress):
            target = staging / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                for suffix, data in pictures(path, None, rendering or Rendering(), converted.note(path)):
                    target.with_name(target.name + suffix).write_bytes(data)
                    converted.images += 1
            except DataError as error:
                converted.left_out["an image that cannot be read"].append(str(error))
        if not converted.images:
            raise DataError(f"{source}: {len(files)} files, and none can be read: {converted.left_out.popitem()[1][0]}")
        write_json(staging / REPORT, {"source": str(source), **converted.summary()})
        replace_folder(staging, output)
    return converted


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / REPORT).is_file())):
        raise DataError(f"{output}: already there, and not from data convert; choose another --output or move it away")


def _usable(rows: Iterable[Row | tuple[str, str]], converted: Converted) -> Iterator[Row]:
    for row in rows:
        converted.rows += 1
        if not isinstance(row, Row):
            reason, location = row
            converted.left_out[reason].append(location)
        elif row.split == "validation":
            converted.left_out["of the validation split"].append(row.place)
        else:
            yield row


class _Images:
    """Writes the images of rows into a data set's folder, each once, and names them."""

    def __init__(self, root: Path, folder: Path, rendering: Rendering, converted: Converted) -> None:
        self._root, self._folder, self._rendering, self._converted = root, folder, rendering, converted
        self._names: dict[str, list[str]] = {}
        self.count = 0

    def place(self, row: Row) -> list[str]:
        """The names of a row's images below the data set's folder; none if one cannot be used, which is noted."""
        names = []
        for image in row.images:
            try:
                names += self._placed(image)
            except DataError as error:
                self._converted.left_out["an image that is missing or cannot be read"].append(f"{row.place}: {error}")
                return []
        return names

    def _placed(self, image: str | bytes) -> list[str]:
        key = image if isinstance(image, str) else hashlib.sha256(image).hexdigest()[:24]
        if key not in self._names:
            self._names[key] = self._write_bytes(key, image) if isinstance(image, bytes) else self._write_file(image)
        return self._names[key]

    def _write_bytes(self, key: str, image: bytes) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / key
            path.write_bytes(image)
            return self._write(path, None, key)

    def _write_file(self, name: str) -> list[str]:
        bare, mark, number = name.rpartition("#")
        frame = int(number) if mark and number.isdecimal() and len(number) < 10 else None
        relative = check_name(bare if frame is not None else name)
        path = self._root / relative
        if not path.is_file() and not path.is_dir():
            raise DataError(f"{path}: no such image")
        ends = path.is_file() and path.suffix != ".gz"
        return self._write(path, frame, str(relative.with_suffix("") if ends else relative))

    def _write(self, path: Path, frame: int | None, stem: str) -> list[str]:
        """Write a file's pictures; `a/b.png` and `a/b.jpg` get different names."""
        names = []
        for suffix, data in pictures(path, frame, self._rendering, self._converted.note(path)):
            name = f"{IMAGES}/{stem}{suffix}"
            if (self._folder / name).exists():
                name = f"{IMAGES}/{stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}{suffix}"
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.write_bytes(data)
                self.count += 1
            names.append(name)
        return names


Placed = tuple[Row, list[str]]


def _parted(rows: Sequence[Placed], split: Split, converted: Converted) -> tuple[list[Placed], list[Placed]]:
    """Training and test rows: as the source says, the others by groups."""
    if not rows:
        reasons = "; ".join(
            f"{len(places)} rows: {reason}, {places[0]}" for reason, places in converted.left_out.items()
        )
        raise DataError(f"no row can be used{': ' if reasons else ''}{reasons}")
    groups = _groups(rows)
    free: dict[str, int] = defaultdict(int)
    for group, (row, _) in zip(groups, rows, strict=True):
        if row.split is None:
            free[group] += 1
    wanted, names = split.test_share * sum(free.values()), sorted(free)
    random.Random(split.seed).shuffle(names)
    drawn: set[str] = set()
    for name in names[1:]:  # one group stays for training
        if sum(free[group] for group in drawn) < wanted:
            drawn.add(name)
    sides: dict[str, list[Placed]] = {"train": [], "test": []}
    seen: dict[str, set[str]] = {"train": set(), "test": set()}
    for group, placed in zip(groups, rows, strict=True):
        side = placed[0].split or ("test" if group in drawn else "train")
        sides[side].append(placed)
        seen[side].add(group)
    converted.shared_groups = sorted(seen["train"] & seen["test"])
    for side, members in sides.items():
        if not members:
            raise DataError(
                f"the {side} side is empty: {len(rows)} rows of {len(set(groups))} groups (by {converted.grouped_by}). "
                "Give more images or patients, or name the column with the split (--split)"
            )
    return sides["train"], sides["test"]


def _groups(rows: Sequence[Placed]) -> list[str]:
    """The group of each row: what the source names, else the row's images, with every row that shares one of them."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    for row, names in rows:
        keys = [f"group {row.group}"] if row.group is not None else []
        first, *others = [*keys, *(f"image {name}" for name in names)]
        for other in others:
            parents[root(other)] = root(first)
    return [root(f"image {names[0]}").partition(" ")[2] for _, names in rows]


def _write(folder: Path, train: Sequence[Placed], test: Sequence[Placed], closed: bool) -> None:
    conversations = [
        {
            "id": str(number),
            "image": names[0] if len(names) == 1 else names,
            "conversations": [
                {"from": speaker, "value": f"{IMAGE}\n{text}" if turn == 0 else text}
                for turn, (speaker, text) in enumerate(row.turns)
            ],
        }
        for number, (row, names) in enumerate(train)
    ]
    write_json(folder / "train.json", conversations)
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number, (row, names) in enumerate(test):
            (_, question), (_, answer) = row.turns[:2]
            kind = row.answer_type or ("CLOSED" if closed or answer.strip(" .").lower() in CLOSED_ANSWERS else "OPEN")
            line = {"question_id": number, "image": names[0] if len(names) == 1 else names, "text": question}
            file.write(json.dumps({**line, "gt": answer, "answer_type": kind}, ensure_ascii=False) + "\n")
