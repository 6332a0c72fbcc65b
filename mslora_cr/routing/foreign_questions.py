"""Which questions of a routed evaluation are like none of the learned tasks, and how well that can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mslora_cr.config.schema import Task
from mslora_cr.metrics.discrimination import placements
from mslora_cr.routing.foreign import LEVEL, part_columns, task_p_values
from mslora_cr.routing.lda import TaskStatistics


class HeldOut(NamedTuple):
    """What is flagged if one learned task is held out: shares in percent, and the area under the ROC curve."""

    false_alarms: float
    detected: float
    auroc: float


class ForeignQuestions:
    """The p-values of questions for every learned task; those of a task's questions are computed once."""

    def __init__(
        self, statistics: Sequence[TaskStatistics], picture_features: int, features_of: Callable[[Task], Tensor]
    ) -> None:
        """
        Args:
            statistics: Those of the learned tasks.
            picture_features: How many features are the picture's; they come first.
            features_of: Gives (questions, features) of a task's questions.
        """
        self._statistics, self._features_of = statistics, features_of
        self._columns = part_columns(picture_features)
        self._known: dict[tuple[str, str], Tensor | None] = {}

    def flagged(self, stage: int, tasks: Sequence[Task]) -> dict[str, dict[str, int]]:
        """Return, by the features that count, how many questions of a task are like none learned by a stage; only
        features for which that is known."""
        values = {part: self._of_part(part, tasks) for part in self._columns}
        return {
            part: {name: int((p[:, :stage].amax(1) < LEVEL).sum()) for name, p in of.items()}
            for part, of in values.items()
            if of
        }

    def held_out(self, stage: int, tasks: Sequence[Task]) -> dict[str, dict[str, HeldOut]]:
        """By learned task, and by the features that count, what is flagged if this task is held out and the others are
        known; empty where fewer than two learned tasks are asked."""
        learned = [task for task in tasks if task.index < stage]
        if len(learned) < 2:
            return {}
        values = {part: of for part in self._columns if (of := self._of_part(part, learned))}
        return {
            task.name: {part: _held_out(of, task, stage) for part, of in values.items()} for task in learned if values
        }

    def _of_part(self, part: str, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Return (questions, learned tasks) by the name of the questions' task; empty where one is not known."""
        values = {task.name: self._p_values(part, task) for task in tasks}
        by_task = {name: p for name, p in values.items() if p is not None}
        return by_task if len(by_task) == len(values) else {}

    def _p_values(self, part: str, task: Task) -> Tensor | None:
        key = part, task.name
        if key not in self._known:
            features = self._features_of(task)
            values = [task_p_values(of, features, part, self._columns[part]) for of in self._statistics]
            p_values = [p for p in values if p is not None]
            self._known[key] = torch.stack(p_values, dim=1) if len(p_values) == len(values) else None
        return self._known[key]


def _held_out(values: Mapping[str, Tensor], task: Task, stage: int) -> HeldOut:
    others = [column for column in range(stage) if column != task.index]
    largest = {name: p[:, others].amax(1) for name, p in values.items()}
    away = largest.pop(task.name)
    home = torch.cat(list(largest.values()))
    foreign = np.arange(len(away) + len(home)) < len(away)
    return HeldOut(
        false_alarms=100 * float((home < LEVEL).double().mean()),
        detected=100 * float((away < LEVEL).double().mean()),
        auroc=float(placements(foreign, -torch.cat([away, home]).numpy())[foreign].mean()),
    )
