"""What an evaluation leaves on disk, typed: `evaluation.json`, `routing.json`, and what is read off them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mslora_cr.data.records import first_problem
from mslora_cr.evaluation.intervals import SAMPLES, Scores, interval, resampled_means
from mslora_cr.evaluation.matrix import TaskStageMatrix
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.utils.errors import UserError

ROUTED, ROUTING = "routed", "routing.json"
"""Where answers without the task being told go in a results folder, and what the router did there."""
ANALYSIS = "analysis.json"


class ReportError(UserError):
    """There is nothing to report, or a file of the run cannot be read; the message names it."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Cell(_Read):
    """A task's answers at a stage: who answered, where the answers are, and their metrics in percent.

    `intervals` has the ends of each metric's bootstrap interval, `questions` the digest of the file asked from,
    `seconds` how long the last launch answered.
    """

    task: str
    stage: int
    banks: tuple[str, ...]
    answers: str
    questions: str
    rows: int
    seconds: float
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class MatrixIntervals(NamedTuple):
    """Bootstrap intervals of what is read off a task × stage matrix: its figures by name, what each task lost, and the
    average over the tasks learned by each stage."""

    figures: dict[str, tuple[float, float]]
    lost: dict[str, tuple[float, float]]
    stages: dict[int, tuple[float, float]]


class Evaluation(_Read):
    """`evaluation.json` of a results folder."""

    run: str
    method: str
    banks_by: str
    tasks: tuple[str, ...]
    modalities: dict[str, str]
    published: dict[str, str | None]
    stages: tuple[int, ...]
    cells: tuple[Cell, ...]
    environment: dict[str, Any]

    def matrix(self, metric: str) -> TaskStageMatrix | None:
        """The task × stage matrix of a metric, over the evaluated tasks that have it; None without such."""
        scores = {(cell.task, cell.stage): cell.metrics[metric] for cell in self.cells if metric in cell.metrics}
        tasks = tuple(task for task in self.tasks if any(task == known for known, _ in scores))
        return TaskStageMatrix(self.tasks, tasks, scores) if tasks else None

    def own_cell(self, task: str) -> Cell | None:
        """A task's cell at its own stage."""
        own = self.tasks.index(task) + 1
        return next((cell for cell in self.cells if (cell.task, cell.stage) == (task, own)), None)

    def last_cell(self, task: str) -> Cell | None:
        """A task's cell after the last stage."""
        return next((cell for cell in self.cells if (cell.task, cell.stage) == (task, len(self.tasks))), None)

    def bank_numbers(self, cell: Cell) -> str:
        """Who answered: `1–3` or `2, 5`, the places of banks in the stream; `none` for the base alone; names if they
        are others."""
        if not set(cell.banks) <= set(self.tasks):
            return ", ".join(cell.banks)
        places = sorted(self.tasks.index(bank) + 1 for bank in cell.banks)
        if len(places) > 1 and places == list(range(places[0], places[-1] + 1)):
            return f"{places[0]}–{places[-1]}"
        return ", ".join(map(str, places)) or "none"

    def scores(self, results_dir: Path, *metrics: str) -> list[dict[tuple[str, int], Scores]]:
        """For each metric, by task and stage, the scores in [0, 1] of the questions that have it, in their order.

        Raises:
            DataError: the scores of a cell are gone.
        """
        places = {(cell.task, cell.stage): (results_dir / cell.answers).with_name(SCORES) for cell in self.cells}
        columns = {place: read_scores(place)[1] for place in set(places.values())}
        found = []
        for metric in metrics:
            known = {place: own[metric][~np.isnan(own[metric])] for place, own in columns.items() if own}
            found.append({key: known[place] for key, place in places.items() if len(known.get(place, ()))})
        return found

    def matrix_intervals(self, results_dir: Path, metric: str) -> MatrixIntervals:
        """The bootstrap intervals of what the metric's matrix gives, where that is known.

        Questions are resampled within each task, the same ones at all its stages; tasks stay as they are.

        Raises:
            ReportError: a task has scores of more questions at one stage than at another.
            DataError: the scores of a cell are gone.
        """
        matrix = self.matrix(metric)
        if matrix is None:
            return MatrixIntervals({}, {}, {})
        figures = [name for name, value in matrix.summary().items() if value is not None]
        lost = matrix.lost()
        stages = [stage for stage, _ in matrix.stage_averages()]
        [scores] = self.scores(results_dir, metric)
        redrawn = self._redrawn(matrix, scores)
        return MatrixIntervals(
            figures={name: interval([getattr(drawn, name)() for drawn in redrawn]) for name in figures},
            lost={task: interval([drawn.forgetting_of(task) for drawn in redrawn]) for task in lost},
            stages={stage: interval([drawn.stage_average(stage) for drawn in redrawn]) for stage in stages},
        )

    def _redrawn(self, matrix: TaskStageMatrix, scores: Mapping[tuple[str, int], Scores]) -> list[TaskStageMatrix]:
        """This matrix recomputed from resampled questions, `SAMPLES` times."""
        drawn: dict[tuple[str, int], Scores] = {}
        for number, task in enumerate(matrix.tasks):
            own = {key: column for key, column in scores.items() if key[0] == task}
            counts = {stage: len(column) for (_, stage), column in own.items()}
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{count} at stage {stage}" for stage, count in counts.items())
                raise ReportError(
                    f"{task} has scores of different questions ({told}); evaluate it again at all these stages"
                )
            means = resampled_means(np.column_stack(list(own.values())), stream=number)
            drawn |= dict(zip(own, 100 * means.T, strict=True))
        return [
            TaskStageMatrix(matrix.stream, matrix.tasks, {key: float(means[sample]) for key, means in drawn.items()})
            for sample in range(SAMPLES)
        ]

    def same_banks_since_learned(self) -> bool:
        """Whether every task is answered by the same banks at all its evaluated stages from its own on.

        False if no task has several such stages. Frozen banks then give the same answers at all those stages,
        and there can be no forgetting.
        """
        since: dict[str, list[tuple[str, ...]]] = {task: [] for task in self.tasks}
        for cell in self.cells:
            if cell.stage > self.tasks.index(cell.task):
                since[cell.task].append(cell.banks)
        several = any(len(banks) > 1 for banks in since.values())
        return several and all(len(set(banks)) <= 1 for banks in since.values())


class StageRouting(_Read):
    """What the router took the questions for after a stage.

    Attributes:
        learned: the tasks it knows. confusion: by a question's task, how many were taken for each of `learned`.
        questions: how many are of learned tasks. accuracy: how many of those it knew, in percent.
    """

    stage: int
    learned: tuple[str, ...]
    confusion: dict[str, tuple[int, ...]]
    questions: int
    accuracy: float | None
    interval: tuple[float, float] | None


class Routing(_Read):
    """`routing.json` of a results folder."""

    stages: tuple[StageRouting, ...]


def read_evaluation(results_dir: Path) -> Evaluation | None:
    """`evaluation.json`, or None if the run is not evaluated.

    Raises:
        ReportError: it is malformed.
    """
    return _load(results_dir / "evaluation.json", Evaluation)


def required_evaluation(results_dir: Path) -> Evaluation:
    """`evaluation.json`.

    Raises:
        ReportError: the run is not evaluated, or it is malformed.
    """
    evaluation = read_evaluation(results_dir)
    if evaluation is None:
        raise ReportError(f"there is no {results_dir / 'evaluation.json'}; evaluate that run first")
    return evaluation


Model = TypeVar("Model", bound=_Read)


def _load(path: Path, model: type[Model]) -> Model | None:
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ReportError(f"{path}: {first_problem(error)}") from None
