"""Figures of closed questions, and errors of counts, by task and stage, from each cell's `clinical.json`."""

from __future__ import annotations

from pathlib import Path

from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.evaluation.results import Evaluation
from mslora_cr.metrics.by_class import (
    AUROC,
    AVERAGE_PRECISION,
    BALANCED,
    MACRO_F1,
    MATTHEWS,
    NPV,
    PPV,
    SENSITIVITY,
    SPECIFICITY,
)
from mslora_cr.metrics.numbers import ERROR
from mslora_cr.statistics.matrix import TaskStageMatrix

CLASS_FIGURES = (BALANCED, MACRO_F1, MATTHEWS, SENSITIVITY, SPECIFICITY, PPV, NPV, AUROC, AVERAGE_PRECISION, ERROR)


def class_matrices(evaluation: Evaluation, results_dir: Path) -> dict[str, TaskStageMatrix]:
    """Return the task × stage matrix of each of `CLASS_FIGURES`, in percent, errors in counts; only of figures that
    some task has. Where a task has more than two classes, areas are the means over them."""
    values: dict[str, dict[tuple[str, int], float]] = {}
    for cell in evaluation.cells:
        clinical = Clinical.read_if_there((results_dir / cell.answers).with_name(CLINICAL))
        figures = clinical.closed.figures if clinical and clinical.closed else {}
        for name in CLASS_FIGURES:
            if found := figures.get(name) or figures.get(f"macro {name}"):
                values.setdefault(name, {})[cell.key] = 100 * found.value
        if clinical and clinical.counts and (error := clinical.counts.mean_absolute_error):
            values.setdefault(ERROR, {})[cell.key] = error.value
    matrices = {}
    for name in (name for name in CLASS_FIGURES if name in values):
        tasks = tuple(task for task in evaluation.tasks if any(task == scored for scored, _ in values[name]))
        matrices[name] = TaskStageMatrix(evaluation.tasks, tasks, values[name])
    return matrices
