"""Where a task's records and images are."""

from __future__ import annotations

from pathlib import Path

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.images import image_roots, resolve_image
from mslora_cr.data.records import TestRecords, TrainingRecords, shown_images
from mslora_cr.utils.errors import DataError


def task_folder(config: StreamConfig, task: Task) -> Path:
    return Path(config.data.root) / task.folder


def task_image_roots(config: StreamConfig, task: Task) -> list[Path]:
    return image_roots(Path(config.data.root), task.folder, task.image_folders)


def training_records(config: StreamConfig, task: Task) -> TrainingRecords:
    """The task's `train.json`.

    Raises:
        DataError: it cannot be read.
    """
    return TrainingRecords(task_folder(config, task) / "train.json")


def test_records(config: StreamConfig, task: Task) -> TestRecords:
    """The task's `test.jsonl`.

    Raises:
        DataError: it cannot be read.
    """
    return TestRecords(task_folder(config, task) / "test.jsonl")


def asked_images(config: StreamConfig, task: Task, records: TestRecords) -> list[Path]:
    """Every image that the task's questions show, once.

    Raises:
        DataError: one is missing or outside its root; names the line of the question.
    """
    roots, paths = task_image_roots(config, task), {}
    for index, record in enumerate(records):
        for name in shown_images(record, config.data.images == "all"):
            if name not in paths:
                try:
                    paths[name] = resolve_image(name, roots)
                except DataError as error:
                    raise DataError(f"{records.path}: {records.location(index)}: {error}") from None
    return list(paths.values())
