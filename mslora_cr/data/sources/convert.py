"""`mslora-cr data convert`: converts tables, conversations and image files into the layout that training reads."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mslora_cr.data.answers.kinds import answer_kinds
from mslora_cr.data.answers.options import letter_of, with_options
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.grouping import connected, drawn_groups
from mslora_cr.data.records import IMAGE, DataError
from mslora_cr.data.rows import read
from mslora_cr.data.rows.read import read_rows
from mslora_cr.data.rows.row import Columns, Problem, Row
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.dicom import is_dicom
from mslora_cr.data.sources.nifti import is_nifti
from mslora_cr.data.sources.placing import IMAGES, PSEUDONYM, ImagePlacer
from mslora_cr.data.sources.rendering import Note, Rendering
from mslora_cr.utils.files import replace_folder, write_json
from mslora_cr.utils.strict_json import JsonError, read_object
from mslora_cr.utils.walk import files_below

REPORT = "convert.json"
EXAMPLES = 5
"""The number of rows that are named for each reason to leave rows out."""
SIDES = {"train": "train.json", "validation": "val.jsonl", "test": "test.jsonl"}
OURS = {*SIDES.values(), REPORT, IMAGES}
UNREADABLE = "an image that cannot be read"
DECIMAL, WHOLE = re.compile(r"-?[0-9]+\.[0-9]+"), re.compile(r"(-?[0-9]+)\.0+")
CLOSED_ANSWERS = frozenset({"yes", "no"})


@dataclass(frozen=True)
class Split:
    """How rows without a split of their own are divided: whole groups, drawn by the seed, until the test side has this
    share of the rows."""

    test_share: float = 0.2
    seed: int = 0


@dataclass
class Converted:
    """The result of a conversion: what it wrote and what it left out.

    Attributes:
        grouped_by: What keeps rows on one side of the split.
        split_by: How the sides were chosen: "the source", or how they were drawn.
        without_patient: The number of rows that name no patient although others do.
        left_out: The rows that are left out, by reason (the first few by name).
        left_out_parts: The rows that lose a part, by reason.
        shared_groups: Groups that the source's own split has on several sides.
        noted: The files by remark on how they were drawn.
        remarks: Remarks on the source as a whole.
        several: The number of rows with several images.
        most_images: The most images of a row.
    """

    rows: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    images: int = 0
    grouped_by: str = "image"
    split_by: str = "the source"
    without_patient: int = 0
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out_parts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    shared_groups: list[str] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    remarks: list[str] = field(default_factory=list)
    several: int = 0
    most_images: int = 0

    def note(self, path: Path) -> Note:
        """Return a callback for remarks on how a file was drawn; each remark counts once."""

        def add(text: str) -> None:
            if self.noted[text][-1:] != [str(path)]:
                self.noted[text].append(str(path))

        return add

    def remark(self, text: str) -> None:
        """Store a remark once."""
        if text not in self.remarks:
            self.remarks.append(text)

    @property
    def lost(self) -> float:
        """The share of the rows that are left out; for images alone, of the files that cannot be read."""
        written = self.train + self.validation + self.test
        lost = self.rows - written if written else len(self.left_out.get(UNREADABLE, ()))
        return lost / max(self.rows, 1)

    def summary(self) -> dict[str, Any]:
        """Return the content of `convert.json`."""
        left_out, parts, noted = (
            {reason: {"count": len(rows), "examples": rows[:EXAMPLES]} for reason, rows in kind.items()}
            for kind in (self.left_out, self.left_out_parts, self.noted)
        )
        counts = {name: getattr(self, name) for name in ("rows", "train", "validation", "test", "images")}
        shared = {"count": len(self.shared_groups), "examples": self.shared_groups[:EXAMPLES]}
        problems = {"groups_on_both_sides": shared, "left_out": left_out, "left_out_parts": parts, "noted": noted}
        split = {"grouped_by": self.grouped_by, "split_by": self.split_by, "rows_without_patient": self.without_patient}
        return {**counts, "rows_with_several_images": self.several, **split, **problems, "remarks": self.remarks}


Placed = tuple[Row, list[str]]
"""A row without its images, and their names in the data set's folder."""


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
    """Write a data set into a folder, whole or not at all: `train.json`, `test.jsonl`, `val.jsonl` where the source has
    validation rows, `images/` and `convert.json`.

    Args:
        source: A file or a folder that `read_rows` reads.
        output: The data set's folder. A folder that an earlier call wrote is replaced.
        columns: The content of each column of a table.
        question: The question about every image, where no column holds one.
        image_root: The folder that image names start from; the source's folder by default.
        split: The side of rows that name none.
        closed: Whether all questions are closed; else those are whose answer is yes or no, and those that a column
            says.

    Raises:
        DataError: The source cannot be read, nothing of it can be used, one side of the split is empty, or the output
            folder is not from an earlier call.
    """
    columns, rendering, split = columns or Columns(), rendering or Rendering(), split or Split()
    converted, root = Converted(), image_root or (source if source.is_dir() else source.parent)
    _check_output(output, source, root)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        staging = Path(folder) / output.name
        (staging / IMAGES).mkdir(parents=True)
        placer = ImagePlacer(root, staging, rendering, converted.note)
        rows = tqdm(read_rows(source, columns, question, converted.remark), "rows", unit="row", disable=not progress)
        placed = _whole_numbers(list(_placed(rows, placer, converted)), converted)
        converted.images, converted.several = placer.count, sum(len(names) > 1 for _, names in placed)
        converted.most_images = max((len(names) for _, names in placed), default=0)
        _describe_groups(placed, columns, converted)
        sides = _parted(placed, split, converted)
        _write(staging, sides, closed)
        converted.train, converted.validation, converted.test = (len(sides[name]) for name in SIDES)
        asked = [row for name in ("test", "validation") for row, _ in sides[name]]
        if later := [row.location for row in asked if len(row.turns) > 2]:
            converted.left_out["the later questions of a conversation on the test side"] = later
        write_json(staging / REPORT, {"source": str(source), **converted.summary()})
        replace_folder(staging, output)
    return converted


def holds_questions(source: Path) -> bool:
    """Return whether a source has questions or labels, and not only images.

    Raises:
        DataError: There is no such file or folder.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    return read.holds_questions(source) if source.is_dir() else not (is_dicom(source) or is_nifti(source))


def convert_images(source: Path, output: Path, rendering: Rendering | None = None, progress: bool = False) -> Converted:
    """Write the pictures of a DICOM or NIfTI file, or of all such files below a folder, as PNG in the same tree.

    Raises:
        DataError: There is none, or the output folder is not from an earlier call.
    """
    _check_output(output, source, source.parent)
    candidates = files_below(source) if source.is_dir() else [source]
    files = [path for path in candidates if is_dicom(path) or is_nifti(path)]
    if not files:
        raise DataError(f"{source}: no DICOM or NIfTI file there; give a table or JSON file by its own path")
    converted, root = Converted(rows=len(files)), source if source.is_dir() else source.parent
    if others := sorted({*candidates} - {*files}):
        converted.left_out["a file that is neither DICOM nor NIfTI"] = [str(path) for path in others]
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
                converted.left_out[UNREADABLE].append(str(error))
        if not converted.images:
            raise DataError(f"{source}: {len(files)} files, and none can be read: {converted.left_out.popitem()[1][0]}")
        write_json(staging / REPORT, {"source": str(source), **converted.summary()})
        replace_folder(staging, output)
    return converted


def _check_output(output: Path, source: Path, root: Path) -> None:
    """Check that only a folder of an earlier call is replaced, and none that contains what is being read."""
    if output.is_symlink():
        raise DataError(f"{output}: a link, and links are never written through; name the folder itself")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not _is_ours(output))):
        raise DataError(f"{output}: already there, and not from data convert; choose another --output or move it away")
    resolved = output.resolve()
    for other in (source.resolve(), root.resolve(), Path.cwd()):
        if other.is_relative_to(resolved):
            raise DataError(f"{output}: contains {other}, and would be replaced as a whole; choose another --output")
    if source.is_dir() and resolved.is_relative_to(source.resolve()):
        raise DataError(f"{output}: lies in {source}, which is read; choose an --output beside it")


def _is_ours(folder: Path) -> bool:
    """Return whether an earlier call made a folder, and nothing was added since."""
    try:
        report = read_object(folder / REPORT)
    except JsonError:
        return False
    return "left_out" in report and (not report.get("train") or {entry.name for entry in folder.iterdir()} <= OURS)


def _placed(rows: Iterable[Row | Problem], placer: ImagePlacer, converted: Converted) -> Iterator[Placed]:
    """Yield every usable row, with its images written. The others are counted."""
    for row in rows:
        converted.rows += 1
        if not isinstance(row, Row):
            reason, location = row
            converted.left_out[reason].append(location)
            continue
        if not _is_text(row):
            converted.left_out["half of a surrogate pair, which is not text"].append(row.location)
            continue
        if row.options and letter_of(row.turns[1][1], row.options) is None:
            converted.left_out["a true answer that is none of the options"].append(row.location)
            continue
        try:
            names = placer.place(row)
        except DataError as error:
            converted.left_out["an image that is missing or cannot be read"].append(f"{row.location}: {error}")
            continue
        if not names:
            converted.left_out["no image"].append(row.location)
            continue
        for reason in row.dropped:
            converted.left_out_parts[reason].append(row.location)
        yield replace(row, images=(), group=row.group or placer.patient(row)), names


def _whole_numbers(placed: list[Placed], converted: Converted) -> list[Placed]:
    """Return rows whose decimal answers are all whole numbers written as 2.0 with 2 instead."""
    answers = [row.turns[1][1] for row, _ in placed]
    decimals = {*filter(DECIMAL.fullmatch, answers)}
    whole = {text: match[1] for text in decimals if (match := WHOLE.fullmatch(text))}
    if not whole or len(whole) < len(decimals):
        return placed
    converted.remark("all decimal answers are whole numbers written as 2.0; they are kept as 2")
    return [
        (replace(row, turns=(row.turns[0], ("gpt", whole.get(answer, answer)), *row.turns[2:])), names)
        for answer, (row, names) in zip(answers, placed, strict=True)
    ]


def _is_text(row: Row) -> bool:
    """Return whether UTF-8 can encode the whole row."""
    names = [image for image in row.images if isinstance(image, str)]
    try:
        json.dumps([names, row.turns, row.group, dict(row.attributes), dict(row.options)], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_groups(placed: Sequence[Placed], columns: Columns, converted: Converted) -> None:
    groups = [row.group for row, _ in placed if row.group]
    if groups:
        by_header = all(group.startswith(PSEUDONYM) for group in groups)
        converted.grouped_by = columns.group or ("patient, as DICOM headers name them" if by_header else "patient")
        converted.without_patient = len(placed) - len(groups)


def _parted(rows: Sequence[Placed], split: Split, converted: Converted) -> dict[str, list[Placed]]:
    """Return the rows of each side: as the source says, the others by groups."""
    if not rows:
        raise DataError(f"no row can be used{_left_out(converted)}")
    groups = connected([_keys(row, names) for row, names in rows])
    free = [(group, row.turns[1][1].lower()) for group, (row, _) in zip(groups, rows, strict=True) if not row.split]
    drawn = drawn_groups([group for group, _ in free], [answer for _, answer in free], split.test_share, split.seed)
    if free:
        drawn_by = f"drawn by {converted.grouped_by}, seed {split.seed}"
        of = f"{len(free):,} rows without one are " if len(free) < len(rows) else ""
        converted.split_by = f"no split in the source: {of}{drawn_by}"
    sides: dict[str, list[Placed]] = {name: [] for name in SIDES}
    seen: dict[str, set[str]] = {name: set() for name in SIDES}
    for group, placed in zip(groups, rows, strict=True):
        side = placed[0].split or ("test" if group in drawn else "train")
        sides[side].append(placed)
        seen[side].add(group)
    counts = Counter(group for members in seen.values() for group in members)
    converted.shared_groups = sorted(group.partition(" ")[2] for group, count in counts.items() if count > 1)
    for side in ("train", "test"):
        if not sides[side]:
            others = ", ".join(f"{len(members)} {name}" for name, members in sides.items() if members)
            draw = "Give more images or patients, or name the column with the split (--split)"
            advice = draw if free else f"The source's split has no row for it; rename one of its splits to {side}"
            raise DataError(
                f"the {side} side is empty: {len(rows)} rows of {len(set(groups))} groups (by {converted.grouped_by}; "
                f"{others}). {advice}{_left_out(converted)}"
            )
    return sides


def _left_out(converted: Converted) -> str:
    """Return the end of an error message: why rows are left out; empty if none are."""
    reasons = [f"{len(skipped)} rows: {reason}, {skipped[0]}" for reason, skipped in converted.left_out.items()]
    return f". Left out are {'; '.join(reasons)}" if reasons else ""


def _keys(row: Row, names: Sequence[str]) -> list[str]:
    """Return the keys that keep a row with others."""
    return [*([f"patient {row.group}"] if row.group else []), *(f"image {name}" for name in names)]


def _write(folder: Path, sides: dict[str, list[Placed]], closed: bool) -> None:
    write_json(
        folder / SIDES["train"], [_conversation(number, *placed) for number, placed in enumerate(sides["train"])]
    )
    everything = [row for members in sides.values() for row, _ in members]
    types = [_answer_type(row, closed) for row in everything]
    turns = [(row.turns[0][1], final_answer(row.turns[1][1]).text) for row in everything]
    kinds = answer_kinds([q for q, _ in turns], [a for _, a in turns], [kind == "CLOSED" for kind in types])
    start = len(sides["train"])
    for side in ("validation", "test"):
        with_kinds = zip(sides[side], types[start:], kinds[start:], strict=False)
        start += len(sides[side])
        if not sides[side]:
            continue
        with (folder / SIDES[side]).open("w", encoding="utf-8", newline="\n") as file:
            for number, ((row, names), answer_type, kind) in enumerate(with_kinds):
                line = {
                    **_question(number, row, names),
                    "answer_type": answer_type,
                    "answer_kind": kind,
                    **_optional_fields(row),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _answer_type(row: Row, closed: bool) -> str:
    answer = final_answer(row.turns[1][1]).text.strip(" .").lower()
    return row.answer_type or ("CLOSED" if closed or row.options or answer in CLOSED_ANSWERS else "OPEN")


def _conversation(number: int, row: Row, names: list[str]) -> dict[str, Any]:
    turns = [
        {"from": speaker, "value": f"{IMAGE}\n{with_options(text, row.options)}" if turn == 0 else text}
        for turn, (speaker, text) in enumerate(row.turns)
    ]
    turns[1]["value"] = _truth(row)
    return {"id": str(number), "image": _one_or_all(names), "conversations": turns, **_optional_fields(row)}


def _question(number: int, row: Row, names: list[str]) -> dict[str, Any]:
    line = {"question_id": number, "image": _one_or_all(names), "text": row.turns[0][1], "gt": _truth(row)}
    return {**line, **({"options": dict(row.options)} if row.options else {})}


def _truth(row: Row) -> str:
    """Return the answer to the first question: the letter, if there are options."""
    return letter_of(row.turns[1][1], row.options) or row.turns[1][1]


def _one_or_all(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


def _optional_fields(row: Row) -> dict[str, Any]:
    """Return the patient and attributes, if they are known, for training and testing."""
    patient = {"patient": row.group} if row.group else {}
    return {**patient, **({"attributes": dict(row.attributes)} if row.attributes else {})}
