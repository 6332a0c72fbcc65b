"""The scores of a public benchmark's scorer, and the overlap of boxes: columns of `scores.csv` and metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.boxes import Box, BoxRule, Size, iou, read_box
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.listed import ListedQuestion
from mslora_cr.data.records import TestRecord, TestRecords
from mslora_cr.data.tasks import test_records
from mslora_cr.metrics.benchmarks import (
    CORRECTED,
    MOST_IOU_MISSED,
    PUBLISHED,
    BenchmarkAnswer,
    corrected_score,
    published_score,
)
from mslora_cr.metrics.captions import caption_columns

IOU, RECALL = "IoU", "recall at IoU 0.5"


class Answer(Protocol):
    @property
    def text(self) -> object: ...


def open_questions(config: StreamConfig, tasks: Collection[Task]) -> dict[str, TestRecords]:
    """Return the questions of some tasks, by name, after a check that the libraries for scoring them are installed.

    Raises:
        DataError: A file of questions, or of further true answers, cannot be read.
        ModuleNotFoundError: The library that scores captions is not installed.
    """
    opened = {task.name: test_records(config, task) for task in tasks}
    if any(task.benchmark == "captions" for task in tasks):
        caption_columns(["a"], [["a"]], java=False)
    return opened


class BoxRow(NamedTuple):
    """An answer to a question about a box, in pixels.

    Attributes:
        said: The box in the answer; None where there is none.
        truth: The true box with the largest overlap.
        size: The size of the image.
        iou: Intersection over union.
    """

    said: Box | None
    truth: Box
    size: Size
    iou: float


def box_rows(
    answers: Sequence[Answer], questions: Sequence[TestRecord] | None, rule: Callable[[], BoxRule]
) -> list[BoxRow | None]:
    """Return the box of each answer; None for questions whose true answer is none.

    Args:
        answers: The answers, in the questions' order.
        rule: Returns how the model writes boxes; called only where there are any.
    """
    rows: list[BoxRow | None] = []
    for answer, question in zip(answers, questions or (), strict=bool(questions)):
        truths = [box for truth in question.truths if (box := read_box(truth))] if question.size else []
        if not truths or question.size is None:
            rows.append(None)
            continue
        said = rule().read(final_answer(str(answer.text)).text, question.size)
        best = max(truths, key=lambda truth: iou(said, truth) if said else 0.0)
        rows.append(BoxRow(said, best, question.size, iou(said, best) if said else 0.0))
    return rows


def box_columns(rows: Sequence[BoxRow | None]) -> dict[str, list[float | None]]:
    """Return IoU and whether it is over a half, by answer; none where no question is about a box. Their means are the
    mean IoU and the recall at 0.5.
    """
    if not any(rows):
        return {}
    return {
        IOU: [None if row is None else row.iou for row in rows],
        RECALL: [None if row is None else float(row.iou > MOST_IOU_MISSED) for row in rows],
    }


def benchmark_columns(
    answers: Sequence[Answer], questions: Sequence[TestRecord] | None, java: bool | None = None
) -> dict[str, list[float | None]]:
    """Return every answer's score by metric; none where the questions are no benchmark's.

    Args:
        answers: The answers, in the questions' order.
        java: As `caption_columns` takes it.

    Raises:
        UserError: Captions cannot be scored (`caption_columns`).
    """
    listed = [question for question in questions or () if isinstance(question, ListedQuestion)]
    benchmark = listed[0].benchmark if listed else None
    if benchmark is None:
        return {}
    finals = [final_answer(str(answer.text)).text.strip() for answer in answers]
    if benchmark == "captions":
        of_captions = caption_columns(finals, [question.truths for question in listed], java)
        return {name: [*values] for name, values in of_captions.items()}
    given = [
        BenchmarkAnswer(text, question.truths, question.text, next(iter(question.images), ""))
        for text, question in zip(finals, listed, strict=True)
    ]
    columns: dict[str, list[float | None]] = {PUBLISHED: [published_score(benchmark, answer) for answer in given]}
    corrected = [corrected_score(benchmark, answer) for answer in given]
    if None not in corrected:
        columns[CORRECTED] = corrected
    return columns
