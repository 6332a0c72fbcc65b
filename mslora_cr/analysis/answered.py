"""A run's answers, question by question, read from its results folder or from a folder of answer files alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mslora_cr.config.run_files import EVALUATION
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.records import DataError
from mslora_cr.evaluation.results import Cell, Evaluation, ReportError, column_of, required_evaluation
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import (
    SCORES,
    AnswerRecord,
    ScoreTable,
    answer_groups,
    probabilities_of,
    read_answers,
    read_scores,
    score_records,
)
from mslora_cr.metrics.by_class import BY_CLASS, class_columns
from mslora_cr.metrics.closed import class_of, confusion
from mslora_cr.metrics.numbers import ERROR, absolute_errors, share_of
from mslora_cr.metrics.typed import (
    BY_LABEL,
    CHOICE,
    COUNT,
    LABELS,
    LABELS_EXACT,
    MOST_LABELS,
    TYPED,
    label_columns,
    label_set,
)
from mslora_cr.statistics.matrix_intervals import Column

COMPARED = {
    CHOICE: CHOICE,
    "closed accuracy": "close accuracy",
    "exact match": "exact match score",
    "F1 of open answers": "f1 score",
    "ROUGE-L": "rouge-l",
    "the benchmark's own score": "benchmark",
    **{name: name for name in TYPED if name != CHOICE},
}
"""Titles and names in `metrics.json`."""
FIGURES = (ERROR, *BY_CLASS, LABELS_EXACT, *BY_LABEL)
"""Titles of what is no score of a single answer; of some, each class or label has a column `TITLE: NAME`."""
LATER = {*TYPED, *FIGURES}
"""Titles that results of earlier versions, without probabilities, or without an answer of a class, do not have."""
Stage = Literal["final", "own"]


@dataclass(frozen=True)
class AnsweredTask:
    """A run's answers to a task.

    Attributes:
        banks: The banks that answered.
        questions: The digest of the test file. Both are None if only answer files are known.
        columns: The scores, by title in `COMPARED`, and what is no score of a single answer (`class_columns`); errors
            of counts (`ERROR`) are NaN where an answer has no number.
    """

    banks: str | None
    questions: str | None
    answers: Path
    columns: Mapping[str, Column]

    def column(self, title: str) -> Column:
        """Return the scores of a title; none where it is not known."""
        return self.columns.get(title, Column(np.empty(0), np.empty(0, dtype=np.int64)))

    @cached_property
    def asked(self) -> str:
        """A digest of the questions, as far as the answer file knows them."""
        rows = [(answer.question_id, answer.answer_type, str(answer.gt)) for answer in read_answers(self.answers)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Answered(NamedTuple):
    """A run: its answers by task, and its method and choice of banks if they are known."""

    method: str | None
    banks_by: str | None
    tasks: Mapping[str, AnsweredTask]

    def same_questions(self, other: Answered, task: str) -> bool:
        """Return whether two runs were asked the same questions of a task."""
        ours, theirs = self.tasks[task], other.tasks[task]
        if ours.questions and theirs.questions and ours.questions != theirs.questions:
            return False
        return ours.asked == theirs.asked  # also where the digests agree: an archive may have other truths


def has_answers(folder: Path) -> bool:
    """Return whether a folder holds answer files alone, in the published layout `TASK/answer-file.jsonl`."""
    return not (folder / EVALUATION).is_file() and any(folder.glob(f"*/{ANSWERS}"))


def answered_run(label: str, folder: Path, at: Stage) -> Answered:
    """Read a run.

    Args:
        label: The run's name in messages.
        folder: Its results folder, or one that `has_answers`.
        at: Score tasks after the last stage, or each at its own; answer files alone are taken as they are.

    Raises:
        ReportError: It is not evaluated as needed.
        DataError: Scores are missing, or answers malformed.
    """
    if has_answers(folder):
        return Answered(None, None, {path.parent.name: _scored(path) for path in sorted(folder.glob(f"*/{ANSWERS}"))})
    run = required_evaluation(folder)
    scores = dict(zip(COMPARED, run.scores(folder, *COMPARED.values()), strict=True))
    tasks = {}
    for task in run.tasks:
        cell = _cell(label, run, task, at)
        none = Column(np.empty(0), np.empty(0, dtype=np.int64))
        columns = {title: of_cell.get((task, cell.stage), none) for title, of_cell in scores.items()}
        if any(len(columns[title].scores) for title in (CHOICE, COUNT, LABELS)):
            columns |= _figures(folder / cell.answers, read_scores((folder / cell.answers).with_name(SCORES)))
        tasks[task] = AnsweredTask(run.bank_numbers(cell), cell.questions, folder / cell.answers, columns)
    return Answered(run.method, run.banks_by, tasks)


def _scored(path: Path) -> AnsweredTask:
    """Score an answer file.

    Which questions are about one image is known from the answers themselves, or from a `scores.csv` of the same
    questions beside them, as `mslora-cr score --questions` writes it.
    """
    answers = read_answers(path)
    scores = score_records(answers).columns
    columns = {name: np.array(column, dtype=np.float64) for name, column in scores.items()}
    table = ScoreTable([str(answer.question_id) for answer in answers], columns, _groups(path, answers))
    compared = {title: column_of(table, name) for title, name in COMPARED.items()}
    return AnsweredTask(None, None, path, compared | _figures(path, table))


def _figures(path: Path, table: ScoreTable) -> dict[str, Column]:
    """Return what is no score of a single answer: figures of closed questions, of counts and of sets of labels."""
    answers = read_answers(path)
    return _by_class(path, answers, table) | _errors(answers, table) | _by_label(answers, table)


def _errors(answers: list[AnswerRecord], table: ScoreTable) -> dict[str, Column]:
    counted = np.flatnonzero(~np.isnan(table.columns.get(COUNT, np.empty(0))))
    if not len(counted):
        return {}
    said = [final_answer(str(answers[index].text)).text for index in counted]
    errors = absolute_errors(said, [str(answers[index].gt) for index in counted])
    return {ERROR: Column(errors, np.unique(table.groups[counted], return_inverse=True)[1])}


def _by_label(answers: list[AnswerRecord], table: ScoreTable) -> dict[str, Column]:
    """Return whether sets are exact, and each label's figures where `share_of` gives them an interval."""
    scores = table.columns.get(LABELS, np.empty(0))
    asked = np.flatnonzero(~np.isnan(scores))
    if not len(asked):
        return {}
    groups = np.unique(table.groups[asked], return_inverse=True)[1]
    said, true = (
        [label_set(final_answer(text).text) for text in texts]
        for texts in ([str(answers[index].text) for index in asked], [str(answers[index].gt) for index in asked])
    )
    by_label = {
        f"{title}: {label}": column
        for label, columns in label_columns(said, true, groups, MOST_LABELS).items()
        for title, column in zip(BY_LABEL, columns, strict=True)
        if len(column.scores) and share_of(*column).interval is not None
    }
    return {LABELS_EXACT: Column((scores[asked] == 1).astype(np.float64), groups)} | by_label


def _by_class(path: Path, answers: list[AnswerRecord], table: ScoreTable) -> dict[str, Column]:
    """Return the figures of closed questions, where these have several classes (`class_columns`)."""
    right = table.columns.get(CHOICE)
    if right is None:
        return {}
    closed = np.flatnonzero(~np.isnan(right))
    truths = [str(answers[index].gt) for index in closed]
    # An answer that was scored as right says its truth: the score knows options and other accepted truths.
    said = [truth if right[index] else str(answers[index].text) for index, truth in zip(closed, truths, strict=True)]
    groups = np.unique(table.groups[closed], return_inverse=True)[1]
    classes = confusion(said, [[truth] for truth in truths], groups)
    return class_columns(classes, _chances(path, classes.names, closed, len(answers)))


def _chances(path: Path, names: Sequence[str], closed: np.ndarray, answers: int) -> np.ndarray | None:
    """Return (closed questions, classes), the probability of each class; None where one is not known."""
    probabilities = probabilities_of(path, answers)
    chances = [probabilities[index] for index in closed] if probabilities else []
    if not chances or not all(chances):
        return None
    by_class = [{class_of(text, {}): p for text, p in (one or {}).items()} for one in chances]
    return np.array([[one.get(name, 0.0) for name in names] for one in by_class])


def _groups(path: Path, answers: Sequence[AnswerRecord]) -> np.ndarray:
    groups_of_answers = answer_groups(answers)
    try:
        table = read_scores(path.with_name(SCORES))
    except DataError:
        return groups_of_answers
    same = table.ids == [str(answer.question_id) for answer in answers]
    return table.groups if same else groups_of_answers


def _cell(label: str, run: Evaluation, task: str, at: Stage) -> Cell:
    cell = run.own_cell(task) if at == "own" else run.last_cell(task)
    if cell is None:
        where, mend = ("at its own stage", "") if at == "own" else ("after the last stage", " --stages seen")
        other = "" if at == "own" else ", or compare with --at own"
        raise ReportError(f"{label}: {task} was not evaluated {where}; run `mslora-cr evaluate CONFIG{mend}`{other}")
    return cell
