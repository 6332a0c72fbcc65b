"""Where a task's records and images are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mslora_cr.config.benchmarks import Benchmark
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.images import image_roots, resolve_image
from mslora_cr.data.listed import ListedQuestions
from mslora_cr.data.records import TestRecord, TestRecords, TrainingRecord, TrainingRecords, shown_images
from mslora_cr.utils.errors import DataError


def task_folder(config: StreamConfig, task: Task) -> Path:
    return Path(config.data.root) / task.folder


def task_image_roots(config: StreamConfig, task: Task) -> list[Path]:
    return image_roots(Path(config.data.root), task.folder, task.image_folders)


def training_file(config: StreamConfig, task: Task) -> Path:
    """The task's training records, `train.json` unless its data set names another file."""
    return task_folder(config, task) / task.train


def test_file(config: StreamConfig, task: Task) -> Path:
    """The task's questions, `test.jsonl` unless its data set names another file."""
    return task_folder(config, task) / task.test


def training_records(config: StreamConfig, task: Task) -> TrainingRecords:
    """The task's training records.

    Raises:
        DataError: they cannot be read.
    """
    return TrainingRecords(training_file(config, task))


def test_records(config: StreamConfig, task: Task) -> TestRecords:
    """The task's questions.

    Raises:
        DataError: they, or the further true answers that the data set names, cannot be read.
    """
    references = task_folder(config, task) / task.references if task.references else None
    return read_questions(test_file(config, task), task.benchmark, references)


def read_questions(
    path: Path,
    benchmark: Benchmark | None = None,
    references: Path | None = None,
    problems: list[str] | None = None,
) -> TestRecords:
    """A file of questions: JSON lines, or a benchmark's list where its name ends in `.json`.

    Args:
        benchmark: whose scorer the questions are for.
        references: the file of further true answers.
        problems: as `TestRecords` takes them.

    Raises:
        DataError: as `TestRecords` and `ListedQuestions`, or a benchmark's scorer is wanted of JSON lines.
    """
    if path.suffix == ".json":
        return ListedQuestions(path, benchmark, references, problems)
    if benchmark is not None:
        raise DataError(f"{path}: the scorer of benchmark {benchmark!r} reads the benchmark's own list, a .json file")
    return TestRecords(path, problems)


def images_shown(config: StreamConfig, task: Task, records: TestRecords | TrainingRecords) -> dict[Path, int]:
    """Every image that the task's records show, in their order, with the first record that shows it.

    Raises:
        DataError: one is missing or outside its root; names the record.
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
