"""Cells of the task × stage matrix: the task, the stage, the banks that answer, and the folder of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.methods.base import method_of

Stages = Literal["own", "final", "seen", "all"]
"""When tasks are evaluated. `own`: each task at its own stage (published); `final`: all after the last stage; `seen`:
each at every stage from its own; `all`: at every stage, and at stage 0, where the base model answers without a bank
(zero shot)."""
CellKey = tuple[str, int]
"""A cell's coordinates: task and stage."""


@dataclass(frozen=True)
class PlannedCell:
    """A task to answer at a stage, the banks that answer it, and the folder of its answers. Stages count from 1; 0 is
    the base model."""

    task: Task
    stage: int
    banks: tuple[int, ...]
    folder: Path

    @property
    def key(self) -> CellKey:
        return self.task.name, self.stage


def cells(config: StreamConfig, stages: Stages, learned: Sequence[int]) -> list[PlannedCell]:
    """Return the cells to fill. Cells of one task that the same banks answer share one folder, and are answered once.

    Args:
        learned: Numbers, from 1, of the tasks whose banks exist.
    """
    method, planned = method_of(config), []
    answering = method.stages(learned, len(config.tasks))
    for task in config.stream:
        number, folders = task.index + 1, {}
        numbers = method.banks(number, number, config.evaluation.banks_by)
        folders[tuple(numbers)] = config.results_run_dir / task.name
        for stage in stages_of(task, stages, config):
            banks = tuple(method.banks(number, stage, config.evaluation.banks_by)) if stage else ()
            if stage not in (0, *answering) or not set(banks) <= set(learned):
                continue
            folder = folders.setdefault(banks, config.results_run_dir / task.name / f"stage-{stage}")
            planned.append(PlannedCell(task, stage, banks, folder))
    return planned


def stages_of(task: Task, stages: Stages, config: StreamConfig) -> Sequence[int]:
    """Return the stages at which a task is to be answered."""
    first, last = task.index + 1, len(config.tasks)
    return {"own": [first], "final": [last], "seen": range(first, last + 1), "all": range(last + 1)}[stages]
