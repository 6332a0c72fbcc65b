"""Where a task's records and images are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from mslora_cr.config.benchmarks import Benchmark
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.images import image_roots, resolve_image
from mslora_cr.data.listed import ListedQuestions
from mslora_cr.data.records import TestRecord, TestRecords, TrainingRecord, TrainingRecords, shown_images
from mslora_cr.data.validation import ValidationRecords, validation_split
from mslora_cr.utils.errors import DataError

if TYPE_CHECKING:
    from mslora_cr.data.datasets import Records

VALIDATION = "val.jsonl"
"""Validation questions of a data set, in the form of `test.jsonl`."""


class MixedRecords(Sequence[TrainingRecord]):
    """The training records of a task, and behind them some of another task's, whose images are named from the data
    root: both have their images below the roots of the first.

    Attributes:
        path: The first task's file.
        digest: Of the records of both.
    """

    def __init__(self, first: TrainingRecords, others: TrainingRecords, root: Path, roots: Sequence[Path]) -> None:
        """
        Args:
            others: The records of the other task.
            roots: Where the other task's images are.
        """
        self.path = first.path
        self.file_digest = first.file_digest
        self.digest = hashlib.sha256(f"{first.digest} {others.digest}".encode()).hexdigest()
        self._first, self._others, self._root, self._roots = first, others, root, roots

    def __len__(self) -> int:
        return len(self._first) + len(self._others)

    @overload
    def __getitem__(self, index: int) -> TrainingRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainingRecord]: ...
    def __getitem__(self, index: int | slice) -> TrainingRecord | list[TrainingRecord]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]
        if index < len(self._first):
            return self._first[index]
        record = self._others[index - len(self._first)]
        return record.model_copy(update={"images": tuple(map(self._from_root, record.images))})

    def __iter__(self) -> Iterator[TrainingRecord]:
        return (self[index] for index in range(len(self)))

    def location(self, index: int) -> str:
        """Describe where a record is, in words."""
        if index < len(self._first):
            return self._first.location(index)
        return f"{self._others.path}: {self._others.location(index - len(self._first))}"

    def _from_root(self, name: str) -> str:
        """Return the name of an image from the data root on; a missing image keeps its name, for the message."""
        try:
            return resolve_image(name, self._roots).relative_to(self._root).as_posix()
        except DataError:
            return name


TaskRecords = TrainingRecords | MixedRecords


def task_folder(config: StreamConfig, task: Task) -> Path:
    return Path(config.data.root) / task.folder


def task_image_roots(config: StreamConfig, task: Task) -> list[Path]:
    return image_roots(Path(config.data.root), task.folder, task.image_folders)


def training_file(config: StreamConfig, task: Task) -> Path:
    """Return the task's training records, `train.json` unless its data set names another file."""
    return task_folder(config, task) / task.train


def test_file(config: StreamConfig, task: Task) -> Path:
    """Return the task's questions, `test.jsonl` unless its data set names another file."""
    return task_folder(config, task) / task.test


def training_records(config: StreamConfig, task: Task) -> TaskRecords:
    """Return the records that a task trains on: its file without what `data.validation` holds out and what the task
    before has taken (`mixed`), `samples` of them; and what it takes of the next task's.

    Raises:
        DataError: A file cannot be read, or has too few records.
    """
    records = _few_shots(config, task)
    for before in config.stream[: task.index][-1:]:
        if before.mixed is not None:
            records = records.only(_taken(config, task, records, before.mixed)[1])
    following = config.stream[task.index + 1 : task.index + 2]
    if task.mixed is None or not following:
        return records
    others = _few_shots(config, following[0])
    taken = others.only(_taken(config, following[0], others, task.mixed)[0])
    return MixedRecords(records, taken, Path(config.data.root), task_image_roots(config, following[0]))


def _few_shots(config: StreamConfig, task: Task) -> TrainingRecords:
    """Return the records of a task that are not held out, at most `samples` of them."""
    records, _ = _sides(config, task)
    if task.samples is None:
        return records
    if task.samples > len(records):
        raise DataError(
            f"tasks.{task.name}.samples is {task.samples}, but {records.path} has {len(records)} records to train on"
        )
    order = _shuffled(len(records), f"{config.seed} {task.name}")  # however many are taken: subsets are nested
    return records.only(sorted(order[: task.samples]))


def _taken(config: StreamConfig, task: Task, records: TrainingRecords, share: float) -> tuple[list[int], list[int]]:
    """Return the places of a task's records that the task before trains on, and of those that stay, at least one."""
    order = _shuffled(len(records), f"{config.seed} {task.name} mixed")
    count = min(round(share * len(records)), len(records) - 1)
    return sorted(order[:count]), sorted(order[count:])


def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def validation_records(config: StreamConfig, task: Task) -> ValidationRecords | None:
    """Return the task's validation records: its `val.jsonl`, or those that `data.validation` holds out; None where
    there are none.

    Raises:
        DataError: A file cannot be read, or there is nothing to hold out.
    """
    file, most = task_folder(config, task) / VALIDATION, config.data.validation_questions
    if file.is_file():
        return ValidationRecords.of_file(TestRecords(file), most)
    _, held_out = _sides(config, task)
    return None if held_out is None else ValidationRecords.held_out_of(held_out, most)


def _sides(config: StreamConfig, task: Task) -> tuple[TrainingRecords, TrainingRecords | None]:
    """Return the records that are trained on, and those that are held out."""
    records, share = TrainingRecords(training_file(config, task)), config.data.validation
    if share is None or (task_folder(config, task) / VALIDATION).is_file():
        return records, None
    split = validation_split(records, share, config.seed)
    if not split.held_out or not split.training:
        raise DataError(
            f"{records.path}: data.validation={share:g} holds out {len(split.held_out)} of {len(records)} records and "
            f"leaves {len(split.training)} to train on; give another share, or add a {VALIDATION}"
        )
    return records.only(split.training), records.only(split.held_out)


def test_records(config: StreamConfig, task: Task) -> TestRecords:
    """Return the task's questions.

    Raises:
        DataError: They, or the further true answers that the data set names, cannot be read.
    """
    references = task_folder(config, task) / task.references if task.references else None
    return read_questions(test_file(config, task), task.benchmark, references)


def read_questions(
    path: Path,
    benchmark: Benchmark | None = None,
    references: Path | None = None,
    problems: list[str] | None = None,
) -> TestRecords:
    """Return a file of questions: JSON lines, or a benchmark's list where its name ends in `.json`.

    Args:
        benchmark: The benchmark whose scorer scores the questions.
        references: The file of further true answers.
        problems: As `TestRecords` takes them.

    Raises:
        DataError: As `TestRecords` and `ListedQuestions`, or a benchmark's scorer is wanted of JSON lines.
    """
    if path.suffix == ".json":
        return ListedQuestions(path, benchmark, references, problems)
    if benchmark is not None:
        raise DataError(f"{path}: the scorer of benchmark {benchmark!r} reads the benchmark's own list, a .json file")
    return TestRecords(path, problems)


def images_shown(
    config: StreamConfig, task: Task, records: Records[TestRecord] | Records[TrainingRecord]
) -> dict[Path, int]:
    """Return every image that the task's records show, in their order, with the index of the first record that shows
    it.

    Raises:
        DataError: An image is missing or outside its root; the message names the record.
    """
    roots, paths, seen = task_image_roots(config, task), dict[Path, int](), set[str]()
    numbered: Iterable[tuple[int, TestRecord | TrainingRecord]] = enumerate(records)
    for index, record in numbered:
        for name in shown_images(record, config.data.images == "all"):
            if name not in seen:
                seen.add(name)
                try:
                    paths.setdefault(resolve_image(name, roots), index)
                except DataError as error:
                    raise DataError(f"{records.path}: {records.location(index)}: {error}") from None
    return paths
