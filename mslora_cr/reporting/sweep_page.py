"""The page, the Markdown and the plot of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from mslora_cr.evaluation.results import ReportError
from mslora_cr.reporting.capacity import Cost, frontier, mean_costs
from mslora_cr.reporting.plots import frontier_dots, sweep_dots
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
COSTS = {"device_hours": "device hours of training", "parameters": "parameters of the banks that answer"}


def write_sweep_page(sweep: SweepResult, output: Path) -> Path:
    """Write `sweep.html`, `sweep.md` and the two plots of a sweep into a folder, and return the page's path."""
    colors = {order: PALETTE[index % len(PALETTE)] for index, order in enumerate(sweep.orders)}
    headline = next((key for key in MATRICES if sweep.metrics.get(key)), None)
    if headline is None:
        raise ReportError("the runs of this sweep have no metric in common")
    panels = {
        title: {
            method: dots
            for method in sweep.metrics[headline]
            if (dots := _sweep_points(sweep.runs, method, headline, figure))
        }
        for figure, title in SWEEP_PANELS.items()
    }
    plot = sweep_dots({title: panel for title, panel in panels.items() if panel}, colors)
    write_text(output / "sweep.svg", plot)
    costs = mean_costs(sweep.runs)
    scores = _final_averages(sweep, headline)
    by_cost = cost_points(costs, scores)
    frontiers = frontier_dots(by_cost, f"final average of {REPORTED_TITLES[headline]}, %") if by_cost else ""
    write_text(output / "frontier.svg", frontiers)
    context = {
        "sweep": sweep,
        "metrics": {REPORTED_TITLES.get(key, key): methods for key, methods in sweep.metrics.items() if methods},
        "reported": list(REPORTED_TITLES.values()),
        "headline": REPORTED_TITLES[headline],
        "columns": SWEEP_COLUMNS,
        "banks_by": {run.method: run.banks_by for run in sweep.runs},
        "ranks": {run.method: run.rank for run in sweep.runs},
        "frozen": sorted({run.method for run in sweep.runs if run.frozen}),
        "costs": costs,
        "scores": scores,
        "frontiers": {title: frontier(panel) for title, panel in by_cost.items()},
        "plot": Markup(plot),
        "frontier_plot": Markup(frontiers),
        "now": datetime.now(UTC),
    }
    for name in ("sweep.html", "sweep.md"):
        render(name, output / name, context)
    return output / "sweep.html"


def cost_points(costs: Mapping[str, Cost], scores: Mapping[str, float]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return (cost, score) by title of the cost and method, without those that are unknown."""
    points = {
        title: {
            method: (float(value), scores[method])
            for method, cost in costs.items()
            if (value := getattr(cost, field)) is not None and method in scores
        }
        for field, title in COSTS.items()
    }
    return {title: panel for title, panel in points.items() if panel}


def _final_averages(sweep: SweepResult, metric: str) -> dict[str, float]:
    figures = {method: spreads.get("final_average") for method, spreads in sweep.metrics[metric].items()}
    return {method: spread.mean for method, spread in figures.items() if spread}


def _sweep_points(runs: Sequence[Outcome], method: str, metric: str, figure: str) -> list[tuple[str, float]]:
    """Return (order, value) of each run of a method that has the figure."""
    values = [(str(run.order), run.figures.get(metric, {}).get(figure)) for run in runs if run.method == method]
    return [(order, value) for order, value in values if isinstance(value, float)]
