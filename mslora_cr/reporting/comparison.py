"""The page that compares several runs of one stream."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mslora_cr.evaluation.results import Evaluation, ReportError, required_evaluation
from mslora_cr.reporting.capacity import answering_rank, cost_of
from mslora_cr.reporting.heatmaps import final_scores_map, matrix_map
from mslora_cr.reporting.plots import stage_curves
from mslora_cr.reporting.render import render
from mslora_cr.reporting.run_record import read_ledger
from mslora_cr.reporting.style import MATRICES, PALETTE, REPORTED_TITLES
from mslora_cr.statistics.interval import CONFIDENCE


def write_comparison(runs: Sequence[tuple[str, Path | None, Path]], output: Path) -> Path:
    """Write one page that shows several runs of one stream side by side, and return its path.

    Args:
        runs: For each run a label, its run folder (None where there is none, as for a served model) and its results
            folder. A report in it is linked.

    Raises:
        ReportError: A run is not evaluated, has nothing in common with the others, or one of its files is malformed.
    """
    colors = {label: PALETTE[index % len(PALETTE)] for index, (label, _, _) in enumerate(runs)}
    evaluations = {label: required_evaluation(results_dir) for label, _, results_dir in runs}
    keys = [key for key, name in MATRICES.items() if all(run.matrix(name) for run in evaluations.values())]
    if not keys:
        raise ReportError(f"the runs {', '.join(evaluations)} have no metric in common; evaluate each of them")
    ledgers = {label: read_ledger(run_dir) if run_dir else None for label, run_dir, _ in runs}
    compared = [
        {
            "label": label,
            "method": evaluations[label].method,
            "cost": cost_of(evaluations[label], ledgers[label]),
            "color": colors[label],
            "link": os.path.relpath(report, output.parent)
            if (report := results_dir / "report.html").is_file()
            else None,
            "banks_by": evaluations[label].banks_by,
            "frozen": evaluations[label].same_banks_since_learned(),
            "rank": answering_rank(evaluations[label], ledgers[label]),
            "seconds": ledger.seconds if (ledger := ledgers[label]) else None,
        }
        for label, _, results_dir in runs
    ]
    folders = {label: results_dir for label, _, results_dir in runs}
    context = {
        "runs": compared,
        "metrics": [_by_metric(key, evaluations, folders, colors) for key in keys],
        "confidence": CONFIDENCE,
        "now": datetime.now(UTC),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    render("comparison.html", output, context)
    return output


def _by_metric(
    key: str, evaluations: Mapping[str, Evaluation], folders: Mapping[str, Path], colors: Mapping[str, str]
) -> dict[str, Any]:
    """Return a metric of all runs: the figures of each run, their averages over the stages, matrices and final
    scores."""
    name = MATRICES[key]
    matrices = {label: matrix for label, run in evaluations.items() if (matrix := run.matrix(name))}
    spans = {label: evaluations[label].matrix_intervals(folder, name) for label, folder in folders.items()}
    curves = {label: points for label, matrix in matrices.items() if (points := matrix.stage_averages())}
    bands = {label: ends.stages for label, ends in spans.items()}
    return {
        "title": REPORTED_TITLES[key],
        "tasks": len({task for matrix in matrices.values() for task in matrix.tasks}),
        "summaries": {label: matrix.summary() for label, matrix in matrices.items()},
        "intervals": {label: ends.figures for label, ends in spans.items()},
        "curves": Markup(stage_curves(curves, bands, colors, f"{REPORTED_TITLES[key]}, %")) if curves else None,
        "maps": [matrix_map(label, name, run, spans[label].transfer) for label, run in evaluations.items()],
        "final": final_scores_map(evaluations, name),
    }
