"""Overlap of training and test data that `data check` found, stored beside the data for everything that uses them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.tasks import task_folder
from mslora_cr.utils.files import write_json
from mslora_cr.utils.strict_json import JsonError, read_object

log = logging.getLogger(__name__)
LEAKS = "leaks.json"


class Leaks(BaseModel):
    """What the training and the test file of a data set have in common.

    Attributes:
        train: SHA-256 of `train.json`, in hexadecimal.
        test: SHA-256 of `test.jsonl`.
        images: The number of images that both files name.
        contents: The number of test images with the bytes of a training image of another name; None if images were not
            read.
        patients: The number of patients that both files name.
        questions: The number of test questions about any of these.
    """

    model_config = ConfigDict(strict=True)

    train: str
    test: str
    images: int
    contents: int | None
    patients: int
    questions: int
    test_questions: int

    @property
    def any(self) -> bool:
        """Whether anything is in common."""
        return bool(self.images or self.contents or self.patients)

    def sentence(self) -> str:
        """Return the warning for readers of scores."""
        parts = ((self.images, "images"), (self.contents or 0, "copied images"), (self.patients, "patients"))
        shared = ", ".join(f"{count:,} {what}" for count, what in parts if count)
        return (
            f"{self.questions:,} of {self.test_questions:,} test questions are about what is trained on, too "
            f"({shared}): their scores are too high"
        )


def remember(folder: Path, leaks: Leaks) -> None:
    """Store the overlap beside the data, also if there is none. Warn if the folder cannot be written to."""
    try:
        write_json(folder / LEAKS, leaks.model_dump())
    except OSError as error:
        log.warning("%s: what is in training and in testing cannot be kept there (%s)", folder, error.strerror or error)


def remembered(folder: Path, digest: str) -> Leaks | None:
    """Return the stored overlap for the training or test file of this digest; None if the data were not checked, or the
    files have changed.
    """
    try:
        leaks = Leaks.model_validate(read_object(folder / LEAKS))
    except (JsonError, ValidationError):
        return None
    return leaks if digest in (leaks.train, leaks.test) else None


def found_by_check(config: StreamConfig, digests: Mapping[str, str]) -> dict[str, Leaks]:
    """Return the overlap in the data of each task that was checked, also if there is none.

    Args:
        config: Says where the data are; tasks that it does not have are skipped.
        digests: By task, the digest of the training or test file.
    """
    folders = {task.name: task_folder(config, task) for task in config.stream if task.name in digests}
    by_task = {name: remembered(folder, digests[name]) for name, folder in folders.items()}
    return {name: leaks for name, leaks in by_task.items() if leaks}


def sentences(found: Mapping[str, Leaks]) -> dict[str, str]:
    """Return the warnings of overlaps, by task."""
    return {name: leaks.sentence() for name, leaks in found.items() if leaks.any}


@cache
def tell(name: str, folder: Path, digest: str) -> None:
    """Warn once about the overlap that `data check` found in a data set."""
    if (leaks := remembered(folder, digest)) and leaks.any:
        log.warning("%s: data check found that %s", name, leaks.sentence())
