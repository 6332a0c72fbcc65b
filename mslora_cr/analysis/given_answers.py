"""Answer files that stand alone, as a published run's do: scored as answers of a configuration's questions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.records import DataError, TestRecords
from mslora_cr.data.tasks import test_records
from mslora_cr.evaluation.doubts import doubts_of
from mslora_cr.evaluation.results import Cell, ReportError
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import SCORES, AnswerRecord, metrics_of, read_answers, read_scores, score_file
from mslora_cr.evaluation.summary import ResultsTarget, write_summary
from mslora_cr.methods.base import method_of
from mslora_cr.runs.lock import one_writer
from mslora_cr.utils.files import file_digest

GIVEN = "given"
"""The folder, in a run's results, of answers that others gave."""


def score_given(config: StreamConfig, given: Path) -> Path:
    """Score the answer files of a folder, each task at its own stage; return the results folder they get.

    Where the data root has the questions that a file answers, they say which answers belong to one picture, and the
    report shows the pictures.

    Args:
        config: The run whose tasks were asked.
        given: The folder with `TASK/answer-file.jsonl`.

    Raises:
        ReportError: The folder has no answers of the configuration's tasks.
        DataError: An answer file is malformed.
        LockedError: Another launch writes to the results folder.
    """
    tasks = [task for task in config.stream if (given / task.name / ANSWERS).is_file()]
    if not tasks:
        names = ", ".join(task.name for task in config.stream)
        raise ReportError(f"{given}: no TASK/{ANSWERS} of the configuration's tasks; they are {names}")
    target = ResultsTarget(config.results_run_dir / GIVEN / given.resolve().name, given.resolve().name, config.method)
    target.folder.mkdir(parents=True, exist_ok=True)
    with one_writer(target.folder):
        write_summary(config, target, [_cell(config, task, given, target.folder) for task in tasks], {})
    return target.folder


def _cell(config: StreamConfig, task: Task, given: Path, root: Path) -> Cell:
    folder = root / task.name
    folder.mkdir(exist_ok=True)
    shutil.copyfile(given / task.name / ANSWERS, folder / ANSWERS)
    answers = read_answers(folder / ANSWERS)
    records = _questions(config, task, answers)
    scores = score_file(folder / ANSWERS, folder, records)
    measured = metrics_of(scores, read_scores(folder / SCORES).groups)
    number = task.index + 1
    banks = method_of(config).banks(number, number, "prefix")
    digest = file_digest(folder / ANSWERS)
    return Cell(
        task=task.name,
        stage=number,
        banks=tuple(config.stream[bank - 1].name for bank in banks),
        answers=f"{task.name}/{ANSWERS}",
        questions=records.digest if records is not None else "",
        rows=len(answers),
        fingerprint=digest,
        seconds=0.0,
        sha256=digest,
        scores_sha256=file_digest(folder / SCORES),
        **doubts_of(folder),
        metrics=measured.metrics,
        intervals=measured.intervals,
        freedom=measured.freedom,
        largest_cluster=measured.largest_cluster,
    )


def _questions(config: StreamConfig, task: Task, answers: Sequence[AnswerRecord]) -> TestRecords | None:
    """Return the questions below the data root, if they are those that were answered."""
    try:
        records = test_records(config, task)
    except DataError:
        return None
    asked = [(str(record.question_id), record.text, record.gt) for record in records]
    same = asked == [(str(answer.question_id), answer.prompt, answer.gt) for answer in answers]
    return records if same else None
