"""Further ways to ask the same banks: without the picture, with the options in another order, from validation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.options import letter_of, rotated
from mslora_cr.data.records import TestRecord, TestRecords
from mslora_cr.data.tasks import VALIDATION, task_folder, test_file, test_records, validation_records
from mslora_cr.evaluation.benchmark import open_questions
from mslora_cr.evaluation.results import EVALUATION, Cell, Evaluation
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.metrics.typed import CHOICE
from mslora_cr.statistics.interval import Interval, bracketed
from mslora_cr.statistics.matrix_intervals import is_binary
from mslora_cr.statistics.paired import paired_change, paired_task
from mslora_cr.utils.files import replacing

HELD_OUT = "questions.jsonl"
"""Validation questions that are held out of training records."""
GREY = (128, 128, 128)
SIDE = 336
"""Pixels of a side of the grey picture, the input size of LLaVA-Med's tower."""
BLANK = "grey.png"


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        name: The folder of the answers below the run's results; "" for the run's own answers.
        validation: Whether the questions are those of `val.jsonl`, or held out of the training records.
        rotation: The number of letters by which the texts of options move on.
        blank: Whether a grey picture replaces every image.
    """

    name: str = ""
    validation: bool = False
    rotation: int = 0
    blank: bool = False

    def path(self, config: StreamConfig, task: Task) -> Path:
        """Return the file of a task's questions: where a share of the training records is held out (`data.validation`),
        it is written with the answers."""
        if not self.validation:
            return test_file(config, task)
        released = task_folder(config, task) / VALIDATION
        return released if released.is_file() else config.results_run_dir / task.name / HELD_OUT

    def records(self, config: StreamConfig, task: Task) -> TestRecords:
        """Return a task's questions.

        Raises:
            DataError: They cannot be read.
        """
        if not self.validation:
            records = test_records(config, task)
            return rotated_records(records, self.rotation) if self.rotation else records
        path = self.path(config, task)
        if path.name == HELD_OUT and (held_out := validation_records(config, task)):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (one.model_dump_json(by_alias=True, exclude_defaults=True) for one in held_out.questions)
            with replacing(path, shared=True) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return TestRecords(path)

    def is_there(self, config: StreamConfig, task: Task) -> bool:
        """Return whether a task has such questions."""
        if self.rotation:
            return len(self.records(config, task)) > 0
        return not self.validation or validation_records(config, task) is not None

    def config(self, config: StreamConfig) -> StreamConfig:
        """Return the configuration, with the results in the folder of this name."""
        if not self.name:
            return config
        parent, _, run = f"{config.results_run_dir}/{self.name}".rpartition("/")
        return config.model_copy(update={"results_dir": parent, "run": run})

    def tasks(self, config: StreamConfig, tasks: Iterable[Task]) -> list[Task]:
        """Return the tasks that have such questions."""
        return [task for task in tasks if self.is_there(config, task)]

    @property
    def facts(self) -> dict[str, Any]:
        """What decides answers besides banks, questions and settings; nothing for the run's own."""
        facts = {"rotation": self.rotation, "blank": self.blank}
        return {name: value for name, value in facts.items() if value}


AS_IT_IS = Asking()
BLIND = Asking("blind", blank=True)
ON_VALIDATION = Asking("validation", validation=True)


def asked_records(config: StreamConfig, tasks: Iterable[Task], asking: Asking) -> dict[str, TestRecords]:
    """Return the questions of some tasks, by name; those of the run's own asking as `open_questions` checks them.

    Args:
        config: of `Asking.config`.
        tasks: which have such questions.
        asking: how they are put.

    Raises:
        DataError, ModuleNotFoundError: as `open_questions`.
    """
    if asking == AS_IT_IS:
        return open_questions(config, list(tasks))
    return {task.name: asking.records(config, task) for task in tasks}


def rotations(count: int) -> list[Asking]:
    """Return the askings of a circular evaluation besides the run's own: every other order of at most so many
    options."""
    return [Asking(f"circular/rotation-{by}", rotation=by) for by in range(1, count)]


def _rotated(record: TestRecord, by: int) -> TestRecord:
    """Return a question whose options are moved on by some letters."""
    options = rotated(record.options, by)
    truths = tuple(_moved(truth, record, options) for truth in record.truths)
    return record.model_copy(update={"options": options, "truths": truths})


def _moved(truth: str, record: TestRecord, options: dict[str, str]) -> str:
    """Return a true answer after its option has got another letter: the new letter, where it was given by letter."""
    letter = letter_of(truth, record.options)
    if letter is None or truth.strip().casefold() == record.options[letter].strip().casefold():
        return truth
    return next(other for other, text in options.items() if text == record.options[letter])


def rotated_records(records: TestRecords, by: int) -> TestRecords:
    """Return the questions with more than so many options, which are moved on by that number of letters."""
    offered = records.only([index for index, one in enumerate(records) if len(one.options) > by])
    return offered.changed(partial(_rotated, by=by))


def _blank(record: TestRecord) -> TestRecord:
    return record.model_copy(update={"images": (BLANK,) * len(record.images)})


def blank_records(records: TestRecords) -> TestRecords:
    """Return the same questions about a grey picture in the place of each image."""
    return records.changed(_blank)


def write_blank(folder: Path) -> None:
    """Write the grey picture, if it is not there."""
    path = folder / BLANK
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial:
            Image.new("RGB", (SIDE, SIDE), GREY).save(partial, "PNG")


class BlindScore(NamedTuple):
    """A metric of answers that were given without the picture, in percent, and what the picture adds, in points."""

    metric: str
    score: float
    gain: float
    interval: Interval

    def in_words(self) -> str:
        """Return `61.2 %; the picture adds 15.2 points [...]`."""
        verdict = "" if self.interval[0] > 0 else ": not above what it says without the picture"
        return f"{self.score:.1f} %; the picture adds {self.gain:.1f} points{bracketed(self.interval)}{verdict}"


def blind_score(cell: Cell, results_dir: Path) -> BlindScore | None:
    """Return what a cell's banks answer to the same questions without the picture: exact choice, or else F1 of open
    answers. None where `evaluate --blind` was not asked for, or asked other questions."""
    found = Evaluation.read_if_there(results_dir / BLIND.name / EVALUATION)
    blind = next((other for other in found.cells if other.key == cell.key), None) if found else None
    metric = next((name for name in (CHOICE, "f1 score") if name in cell.metrics), None)
    if blind is None or metric is None or (blind.questions, blind.banks) != (cell.questions, cell.banks):
        return None
    seen, unseen = (
        read_scores((root / of.answers).with_name(SCORES))
        for root, of in ((results_dir, cell), (results_dir / BLIND.name, blind))
    )
    columns = [table.columns.get(metric) for table in (seen, unseen)]
    if columns[0] is None or columns[1] is None or len(columns[0]) != len(columns[1]):
        return None
    scored = ~np.isnan(columns[0]) & ~np.isnan(columns[1])
    with_picture, without = columns[0][scored], columns[1][scored]
    groups = np.unique(seen.groups[scored], return_inverse=True)[1]
    task = paired_task(with_picture - without, groups, is_binary(with_picture) and is_binary(without))
    gain = 100 * float((with_picture - without).mean())
    return BlindScore(metric, 100 * float(without.mean()), gain, paired_change([task]).ends)
