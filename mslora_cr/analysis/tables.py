"""An evaluation as plain tables: lists of rows, each a dictionary, which `pandas.DataFrame` takes as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mslora_cr.evaluation.results import Cell, Evaluation, ReportError, required_evaluation
from mslora_cr.evaluation.score import SCORES, read_answers, read_scores

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The results folder of an evaluated run."""

    folder: Path
    evaluation: Evaluation

    def scores(self) -> list[Row]:
        """Return a row for each task, stage and metric: `score`, `low` and `high` in percent (the ends of the 95 %
        interval), `questions` asked, and `banks` that answered."""
        return [
            {
                "run": self.evaluation.run,
                "method": self.evaluation.method,
                "task": cell.task,
                "stage": cell.stage,
                "metric": metric,
                "score": score,
                "low": cell.intervals[metric][0],
                "high": cell.intervals[metric][1],
                "questions": cell.rows,
                "banks": "+".join(cell.banks),
            }
            for cell in self.evaluation.cells
            for metric, score in cell.metrics.items()
        ]

    def summary(self, metric: str = "close accuracy") -> dict[str, float | None]:
        """Return the figures of a metric's task × stage matrix, in percent; None where cells are missing."""
        matrix = self.evaluation.matrix(metric)
        return dict(matrix.summary()) if matrix else {}

    def answers(self, task: str, stage: int | None = None) -> list[Row]:
        """Return a row for each question of a task: `question_id`, `question`, `answer`, `truth`, `answer_type`, and
        its score in each metric, in [0, 1], None where the metric does not apply.

        Args:
            stage: A stage of the stream; the task's last evaluated one by default.

        Raises:
            ReportError: It was not evaluated there.
            DataError: A file of it is gone or damaged.
        """
        cell = self._cell(task, stage)
        answers = read_answers(self.folder / cell.answers)
        columns = read_scores((self.folder / cell.answers).with_name(SCORES)).columns
        rows = []
        for number, answer in enumerate(answers):
            scores = {metric: float(column[number]) for metric, column in columns.items()}
            stage_columns = {
                "question_id": answer.question_id,
                "question": answer.prompt,
                "answer": answer.text,
                "truth": answer.gt,
                "answer_type": answer.answer_type,
            }
            rows.append(
                stage_columns | {metric: None if np.isnan(score) else score for metric, score in scores.items()}
            )
        return rows

    def _cell(self, task: str, stage: int | None) -> Cell:
        cells = {cell.stage: cell for cell in self.evaluation.cells if cell.task == task}
        chosen = max(cells, default=None) if stage is None else stage
        if chosen not in cells:
            there = ", ".join(f"{cell.task} at stage {cell.stage}" for cell in self.evaluation.cells)
            raise ReportError(f"{self.folder}: {task} is not evaluated at that stage; there are {there}")
        return cells[chosen]


def read_results_folder(folder: Path) -> Results:
    """Return the results of a run.

    Raises:
        ReportError: It is not evaluated, or its `evaluation.json` is malformed.
    """
    return Results(folder, required_evaluation(folder))
