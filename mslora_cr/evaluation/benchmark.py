"""The scores of a public benchmark's scorer: columns of `scores.csv` and metrics of every report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.listed import ListedQuestion
from mslora_cr.data.records import TestRecord, TestRecords
from mslora_cr.data.tasks import test_records
from mslora_cr.metrics.benchmarks import CORRECTED, PUBLISHED, BenchmarkAnswer, corrected_score, published_score
from mslora_cr.metrics.captions import caption_columns


class Answer(Protocol):
    @property
    def text(self) -> object: ...


def open_questions(config: StreamConfig, tasks: Collection[Task]) -> dict[str, TestRecords]:
    """The questions of some tasks, by name, after a check that the libraries for scoring them are installed.

    Raises:
        DataError: A file of questions, or of further true answers, cannot be read.
        ModuleNotFoundError: The library that scores captions is not installed.
    """
    opened = {task.name: test_records(config, task) for task in tasks}
    if any(task.benchmark == "captions" for task in tasks):
        caption_columns(["a"], [["a"]], java=False)
    return opened


def benchmark_columns(
    answers: Sequence[Answer], questions: Sequence[TestRecord] | None, java: bool | None = None
) -> dict[str, list[float]]:
    """By metric, every answer's score; none where the questions are no benchmark's.

    Args:
        answers: to the questions, in their order.
        java: as `caption_columns` takes it.

    Raises:
        UserError: captions cannot be scored (`caption_columns`).
    """
    listed = [question for question in questions or () if isinstance(question, ListedQuestion)]
    benchmark = listed[0].benchmark if listed else None
    if benchmark is None:
        return {}
    finals = [final_answer(str(answer.text)).text.strip() for answer in answers]
    if benchmark == "captions":
        return caption_columns(finals, [question.truths for question in listed], java)
    given = [
        BenchmarkAnswer(text, question.truths, question.text, next(iter(question.images), ""))
        for text, question in zip(finals, listed, strict=True)
    ]
    columns = {PUBLISHED: [published_score(benchmark, answer) for answer in given]}
    corrected = [corrected_score(benchmark, answer) for answer in given]
    known = [score for score in corrected if score is not None]
    return columns | ({CORRECTED: known} if known else {})
