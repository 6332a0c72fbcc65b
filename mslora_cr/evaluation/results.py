"""The result of an evaluation on disk: `evaluation.json`, typed, and the figures computed from it."""

from __future__ import annotations

import math
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from mslora_cr.config.run_files import EVALUATION
from mslora_cr.evaluation.score import SCORES, ScoreTable, read_scores
from mslora_cr.statistics.matrix import TaskStageMatrix
from mslora_cr.statistics.matrix_intervals import Column, MatrixIntervals, matrix_intervals
from mslora_cr.utils.errors import UserError, shorten
from mslora_cr.utils.files import file_digest
from mslora_cr.utils.state import Part, StateFile


class ReportError(UserError):
    """There is nothing to report, or results do not fit together."""


class Cell(Part):
    """A task's answers at a stage: which banks answered, where the answers are, and their metrics in percent.

    `intervals` has the ends of each metric's interval, `freedom` its degrees of freedom and `largest_cluster` the share
    of the largest cluster; earlier versions did not note the last two. `questions` is the digest of the test file,
    `sha256` and `scores_sha256` are those of the scored answers and of their scores, which version 0.1.0 did not note.
    `unfinished` answers were cut at `evaluation.max_new_tokens`, `overlong` ones of them are longer than any true
    answer, `empty` ones have no text, `thinking` ones contain reasoning and are scored by their final part, `truncated`
    ones end within it. `reasons` counts why a served model stopped; `greedy` is false if it did not accept temperature
    0. Earlier versions noted none of the seven. The rest is from the answers' `Stamp`.
    """

    task: str
    stage: int
    banks: tuple[str, ...]
    answers: str
    questions: str
    rows: int
    fingerprint: str
    seconds: float
    padding: float | None = None
    padding_unsorted: float | None = None
    sha256: str | None = None
    scores_sha256: str | None = None
    images: str | None = None
    unfinished: int | None = None
    overlong: int | None = None
    empty: int | None = None
    thinking: int | None = None
    truncated: int | None = None
    reasons: dict[str, int] | None = None
    greedy: bool | None = None
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    freedom: dict[str, float] = Field(default_factory=dict)
    largest_cluster: dict[str, float] = Field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.stage


class Evaluation(StateFile):
    """`evaluation.json` of a results folder: the cells that one model answered."""

    MEND: ClassVar[str] = "remove it; `mslora-cr evaluate` with the same --stages writes it again from the answers"

    run: str
    method: str
    banks_by: str
    tasks: tuple[str, ...]
    modalities: dict[str, str]
    published: dict[str, str | None]
    same_as: dict[str, str] = Field(default_factory=dict)
    """The task of the first site, by task at another site."""
    stages: tuple[int, ...]
    cells: tuple[Cell, ...]
    environment: dict[str, Any]

    @model_validator(mode="after")
    def _check_contents(self) -> Self:
        """Check that the parts fit together: the file may have been edited."""
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: expected the stream's tasks, each once")
        for name, of_tasks in (("modalities", self.modalities), ("published", self.published)):
            if missing := [task for task in self.tasks if task not in of_tasks]:
                raise ValueError(f"{name}: there is no entry of task {shorten(missing[0])}")
        coordinates = [cell.key for cell in self.cells]
        if sorted({stage for _, stage in coordinates}) != list(self.stages):
            raise ValueError(f"stages: {shorten(list(self.stages))} are not those of the cells")
        if len(set(coordinates)) < len(coordinates):
            raise ValueError("cells: a task appears twice at one stage")
        for number, cell in enumerate(self.cells):
            self._check_cell(number, cell)
        return self

    def _check_cell(self, number: int, cell: Cell) -> None:
        if cell.task not in self.tasks or not 0 <= cell.stage <= len(self.tasks):
            raise ValueError(f"cells[{number}]: task {shorten(cell.task)} at stage {cell.stage} is outside the matrix")
        if PurePath(cell.answers).is_absolute() or ".." in PurePath(cell.answers).parts or "\0" in cell.answers:
            raise ValueError(f"cells[{number}].answers: {shorten(cell.answers)} leads out of the results folder")
        figures = [*cell.metrics.values(), *(end for ends in cell.intervals.values() for end in ends)]
        if cell.rows < 0 or not all(map(math.isfinite, figures)):
            raise ValueError(f"cells[{number}]: rows and figures of task {shorten(cell.task)} are no results")

    def matrix(self, metric: str) -> TaskStageMatrix | None:
        """Return the task × stage matrix of a metric, over the evaluated tasks that have it; None if there are none."""
        scores = {(cell.task, cell.stage): cell.metrics[metric] for cell in self.cells if metric in cell.metrics}
        tasks = tuple(task for task in self.tasks if any(task == scored for scored, _ in scores))
        return TaskStageMatrix(self.tasks, tasks, scores) if tasks else None

    def own_cell(self, task: str) -> Cell | None:
        """Return a task's cell at its own stage."""
        stage = self.tasks.index(task) + 1
        return next((cell for cell in self.cells if (cell.task, cell.stage) == (task, stage)), None)

    def last_cell(self, task: str) -> Cell | None:
        """Return a task's cell after the last stage."""
        return next((cell for cell in self.cells if (cell.task, cell.stage) == (task, len(self.tasks))), None)

    def bank_numbers(self, cell: Cell) -> str:
        """Return the banks that answered: `1–3` or `2, 5`, their numbers in the stream; `none` for the base model
        alone; names for other banks."""
        if not set(cell.banks) <= set(self.tasks):
            return ", ".join(cell.banks)
        numbers = sorted(self.tasks.index(bank) + 1 for bank in cell.banks)
        if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}–{numbers[-1]}"
        return ", ".join(map(str, numbers)) or "none"

    def scores(self, results_dir: Path, *metrics: str) -> list[dict[tuple[str, int], Column]]:
        """Return for each metric, by task and stage, the questions that have it, in their order.

        Raises:
            DataError: The scores of a cell are missing.
        """
        files = {(cell.task, cell.stage): (results_dir / cell.answers).with_name(SCORES) for cell in self.cells}
        tables = {path: read_scores(path) for path in set(files.values())}
        by_metric = []
        for metric in metrics:
            columns = {path: column_of(table, metric) for path, table in tables.items()}
            by_metric.append({key: columns[path] for key, path in files.items() if len(columns[path].scores)})
        return by_metric

    def matrix_intervals(self, results_dir: Path, metric: str) -> MatrixIntervals:
        """Return the intervals of a metric's figures, as far as they are known.

        Raises:
            DataError: The scores of a cell are missing, or cover more questions at one stage than at another.
            ReportError: A cell has the metric, but its scores do not.
        """
        matrix = self.matrix(metric)
        if matrix is None:
            return MatrixIntervals({}, {}, {})
        [columns] = self.scores(results_dir, metric)
        answers = {(cell.task, cell.stage): cell.answers for cell in self.cells}
        for position in matrix.scores.keys() - columns.keys():
            scores = (results_dir / answers[position]).with_name(SCORES)
            raise ReportError(f"{scores} has no {metric}, though {EVALUATION} gives one; evaluate that run again")
        return matrix_intervals(matrix, columns, answers)

    def same_banks_since_learned(self) -> bool:
        """Return whether every task is answered by the same banks at all its evaluated stages from its own on.

        False if no task has several such stages. Frozen banks give the same answers at all those stages, so there can
        be no forgetting.
        """
        since: dict[str, list[tuple[str, ...]]] = {task: [] for task in self.tasks}
        for cell in self.cells:
            if cell.stage > self.tasks.index(cell.task):
                since[cell.task].append(cell.banks)
        several = any(len(banks) > 1 for banks in since.values())
        return several and all(len(set(banks)) <= 1 for banks in since.values())


def column_of(table: ScoreTable, metric: str) -> Column:
    """Return the questions of a table that have a metric; empty if it is not there."""
    scores = table.columns.get(metric, np.full(len(table.ids), np.nan))
    scored = ~np.isnan(scores)
    return Column(scores[scored], table.groups[scored])


def read_evaluation(results_dir: Path) -> Evaluation | None:
    """Return `evaluation.json`, or None if the run is not evaluated.

    Raises:
        StateError: It is damaged, or a later version wrote it.
        ReportError: Its answers or scores were changed since.
    """
    evaluation = Evaluation.read_if_there(results_dir / EVALUATION)
    for cell in evaluation.cells if evaluation else ():
        answers = results_dir / cell.answers
        for file, digest in ((answers, cell.sha256), (answers.with_name(SCORES), cell.scores_sha256)):
            if digest is not None and file.is_file() and file_digest(file) != digest:
                raise ReportError(f"{file} was changed since it was scored; evaluate that run again")
    return evaluation


def required_evaluation(results_dir: Path) -> Evaluation:
    """Return `evaluation.json`.

    Raises:
        ReportError: The run is not evaluated; or as `read_evaluation`.
        StateError: As `read_evaluation`.
    """
    evaluation = read_evaluation(results_dir)
    if evaluation is None:
        raise ReportError(f"there is no {results_dir / EVALUATION}; evaluate that run first")
    return evaluation
