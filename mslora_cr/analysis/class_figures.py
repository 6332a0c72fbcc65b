"""Figures of closed questions, of probabilities and of counts by task and stage, from each cell's `clinical.json`."""

from __future__ import annotations

from pathlib import Path

from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.evaluation.results import Evaluation
from mslora_cr.metrics.by_class import (
    AT_COVERAGE,
    AUROC,
    AVERAGE_PRECISION,
    BALANCED,
    BRIER,
    CALIBRATION_ERROR,
    MACRO_F1,
    MATTHEWS,
    NPV,
    PPV,
    RISK_COVERAGE,
    SENSITIVITY,
    SPECIFICITY,
)
from mslora_cr.metrics.numbers import ERROR
from mslora_cr.metrics.typed import COUNT, LABELS, LABELS_EXACT
from mslora_cr.statistics.matrix import TaskStageMatrix

CLASS_FIGURES = (BALANCED, MACRO_F1, MATTHEWS, SENSITIVITY, SPECIFICITY, PPV, NPV, AUROC, AVERAGE_PRECISION)
NOT_PERCENT = (BRIER, ERROR)
"""Figures in another unit, of which lower values are better: Brier's score in [0, 1], and errors in counts."""
LOWER_IS_BETTER = (CALIBRATION_ERROR, RISK_COVERAGE, *NOT_PERCENT)
FIGURES = (*CLASS_FIGURES, *AT_COVERAGE, COUNT, LABELS, LABELS_EXACT, *LOWER_IS_BETTER)


def class_matrices(evaluation: Evaluation, results_dir: Path) -> dict[str, TaskStageMatrix]:
    """Return the task × stage matrix of each of `FIGURES`, in percent, Brier's score in [0, 1] and errors in counts;
    only of figures that some task has. Where a task has more than two classes, areas are the means over them."""
    values: dict[str, dict[tuple[str, int], float]] = {}
    for cell in evaluation.cells:
        clinical = Clinical.read_if_there((results_dir / cell.answers).with_name(CLINICAL))
        for name, value in (_figures(clinical) if clinical else {}).items():
            values.setdefault(name, {})[cell.key] = value
    matrices = {}
    for name in (name for name in FIGURES if name in values):
        tasks = tuple(task for task in evaluation.tasks if any(task == known for known, _ in values[name]))
        matrices[name] = TaskStageMatrix(evaluation.tasks, tasks, values[name])
    return matrices


def _figures(clinical: Clinical) -> dict[str, float]:
    figures = clinical.closed.figures if clinical.closed else {}
    found = {name: figures.get(name) or figures.get(f"macro {name}") for name in CLASS_FIGURES}
    values = {name: 100 * figure.value for name, figure in found.items() if figure}
    if clinical.closed and (calibration := clinical.closed.calibration):
        shares = [calibration.expected_error, calibration.risk_coverage_area]
        shares += [calibration.accuracy_at_80, calibration.accuracy_at_90]
        named = zip((CALIBRATION_ERROR, RISK_COVERAGE, *AT_COVERAGE), shares, strict=True)
        values |= {name: 100 * share for name, share in named}
        if calibration.brier is not None:
            values[BRIER] = calibration.brier
    if clinical.counts and (error := clinical.counts.mean_absolute_error):
        values[ERROR] = error.value
        values[COUNT] = 100 * clinical.counts.exact.value
    if sets := clinical.label_sets:
        values |= {LABELS: 100 * sets.f1.value, LABELS_EXACT: 100 * sets.exact.value}
    return values
