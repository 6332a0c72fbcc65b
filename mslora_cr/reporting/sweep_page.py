"""The page, the Markdown and the plot of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from mslora_cr.evaluation.results import ReportError
from mslora_cr.reporting.capacity import mean_costs
from mslora_cr.reporting.plots import sweep_dots
from mslora_cr.reporting.render import render
from mslora_cr.reporting.style import MATRICES, PALETTE, REPORTED_TITLES
from mslora_cr.reporting.sweep_result import Outcome, SweepResult
from mslora_cr.utils.files import write_text

SWEEP_PANELS = {"final_average": "final average, %", "forgetting": "forgetting, points"}
SWEEP_COLUMNS = {
    "final_average": "Final average",
    "average_incremental_accuracy": "Incremental",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
}


def write_sweep_page(sweep: SweepResult, output: Path) -> Path:
    """Write `sweep.html`, `sweep.md` and `sweep.svg` of a sweep into a folder, and return the page's path."""
    colors = {order: PALETTE[index % len(PALETTE)] for index, order in enumerate(sweep.orders)}
    headline = next((key for key in MATRICES if sweep.metrics.get(key)), None)
    if headline is None:
        raise ReportError("the runs of this sweep have no metric in common")
    panels = {
        title: {
            method: points
            for method in sweep.metrics[headline]
            if (points := _sweep_points(sweep.runs, method, headline, figure))
        }
        for figure, title in SWEEP_PANELS.items()
    }
    plot = sweep_dots({title: panel for title, panel in panels.items() if panel}, colors)
    write_text(output / "sweep.svg", plot)
    context = {
        "sweep": sweep,
        "metrics": {REPORTED_TITLES.get(key, key): methods for key, methods in sweep.metrics.items() if methods},
        "reported": list(REPORTED_TITLES.values()),
        "headline": REPORTED_TITLES[headline],
        "columns": SWEEP_COLUMNS,
        "banks_by": {run.method: run.banks_by for run in sweep.runs},
        "ranks": {run.method: run.rank for run in sweep.runs},
        "frozen": sorted({run.method for run in sweep.runs if run.frozen}),
        "costs": mean_costs(sweep.runs),
        "plot": Markup(plot),
        "now": datetime.now(UTC),
    }
    for name in ("sweep.html", "sweep.md"):
        render(name, output / name, context)
    return output / "sweep.html"


def _sweep_points(runs: Sequence[Outcome], method: str, metric: str, figure: str) -> list[tuple[str, float]]:
    """Return (order, value) of each run of a method that has the figure."""
    values = [(str(run.order), run.figures.get(metric, {}).get(figure)) for run in runs if run.method == method]
    return [(order, value) for order, value in values if isinstance(value, float)]
