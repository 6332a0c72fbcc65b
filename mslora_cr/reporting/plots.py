"""The report's plots as inline SVG, which takes its text colour and font from the surrounding page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mslora_cr.clinical.file import AttributeMeasured, Curves
from mslora_cr.reporting.capacity import frontier
from mslora_cr.reporting.style import PALETTE

TERMS = {
    "ce": "Cross-entropy",
    "contrastive": "Contrastive term",
    "orthogonality": "Orthogonality term",
    "overlap": "Overlap with earlier banks",
    "norm": "Norm of the new bank",
    "drift": "Drift from earlier tasks",
    "distillation": "Distillation",
    "key_elements": "Key elements of earlier tasks",
}
NO_TERMS = frozenset({"step", "epoch", "loss", "learning_rate", "grad_norm", "alpha", "beta"})
"""Other entries of a log."""
VALIDATION = "eval_"
"""The names of validation figures begin with this in a log."""
VALIDATION_LOSS = f"{VALIDATION}loss"
VALIDATION_TITLES = {
    VALIDATION_LOSS: "Validation: cross-entropy",
    f"{VALIDATION}exact match score": "Validation: exact answers (%)",
    f"{VALIDATION}close accuracy": "Validation: closed accuracy (%)",
    f"{VALIDATION}f1 score": "Validation: F1 of open answers (%)",
}
"""The validation figures that are drawn."""
MAX_OTHERS = 8
"""At most this many terms without a title here are drawn: those of a method outside the package."""
INK = "#010203"
"""This colour stands for the page's text colour until the SVG is finished."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "svg.hashsalt": "mslora-cr",  # the same run gives the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
    "lines.linewidth": 1.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
SIDE = 3.0
"""Side of a square panel in inches."""
MAX_POINTS = 200
"""Longer curves are averaged over bins, to at most this many points a task."""

Log = Sequence[Mapping[str, float]]


def logged_terms(logs: Mapping[str, Log]) -> list[str]:
    """Return the terms of the loss in logs by task: first those with a title, in its order, then at most `MAX_OTHERS`
    others."""
    names = {name for name in _logged(logs) if not name.startswith(VALIDATION)} - NO_TERMS
    return [*(term for term in TERMS if term in names), *sorted(names - TERMS.keys())[:MAX_OTHERS]]


def _logged(logs: Mapping[str, Log]) -> set[str]:
    return {name for log in logs.values() for entry in log for name in entry}


def loss_curves(logs: Mapping[str, Log], colors: Mapping[str, str]) -> str | None:
    """Plot each logged loss term over the steps of the whole stream, task after task, with the validation figures
    below; None if nothing was logged.

    Args:
        logs: The logged steps by task, in stream order; a term is absent where it does not apply.
    """
    terms, spans = logged_terms(logs), _spans(logs)
    if not terms or not spans:
        return None
    terms += [name for name in VALIDATION_TITLES if name in _logged(logs)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.5 + 1.9 * len(terms)), layout="constrained")
        axes = figure.subplots(len(terms), 1, sharex=True, squeeze=False)[:, 0]
        for row, (ax, term) in enumerate(zip(axes, terms, strict=True)):
            ax.set_title((TERMS | VALIDATION_TITLES).get(term, term))
            for task, (start, _) in spans.items():
                points = [(start + entry["step"], entry[term]) for entry in logs[task] if term in entry]
                marked = len(points) == 1 or term in VALIDATION_TITLES
                ax.plot(*_thinned(points), color=colors[task], marker="." if marked else None)
            _mark_tasks(ax, spans, named=row == 0)
        axes[-1].set_xlabel("optimizer step of the stream")
        return to_svg(figure)


def stage_curves(
    averages: Mapping[str, Sequence[tuple[int, float]]],
    bands: Mapping[str, Mapping[int, tuple[float, float]]],
    colors: Mapping[str, str],
    label: str,
) -> str:
    """Plot one line a run: an average over stages, in percent, in a band of its intervals.

    Args:
        averages: (stage, average) by run.
        bands: The interval of the average, by run and stage.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3), layout="constrained")
        ax = figure.subplots()
        for run, points in averages.items():
            stages = [stage for stage, _ in points]
            ax.plot(*zip(*points, strict=True), color=colors[run], marker="o", markersize=4, label=run)
            low, high = zip(*(bands[run][stage] for stage in stages), strict=True)
            ax.fill_between(stages, low, high, color=colors[run], alpha=0.15, linewidth=0)
        ax.set(xlabel="stage", ylabel=label, ylim=(0, 103))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", alpha=0.15, color=INK)
        ax.legend(frameon=False, loc="lower left")
        return to_svg(figure)


def sweep_dots(panels: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]], colors: Mapping[str, str]) -> str:
    """Plot a panel for each figure with a row for each method: a dot for each run in its order's colour, a bar at the
    mean.

    Args:
        panels: (order, value) by title and method.
        colors: Colours by order.
    """
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.1 + 0.34 * len(methods)), layout="constrained")
        for ax, (title, panel) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
        ):
            ax.set_title(title)
            for row, method in enumerate(methods):
                points = panel.get(method, ())
                for index, order in enumerate(colors):
                    values = [value for drawn, value in points if drawn == order]
                    height = row + 0.28 * (index / max(1, len(colors) - 1) - 0.5)  # orders one below the other
                    label = f"order {order}" if row == 0 else None
                    ax.plot(values, [height] * len(values), ".", color=colors[order], markersize=7, label=label)
                if points:
                    mean = sum(value for _, value in points) / len(points)
                    ax.plot([mean, mean], [row - 0.32, row + 0.32], color=INK, linewidth=1)
            ax.set_yticks(range(len(methods)), methods)
            ax.grid(axis="x", alpha=0.15, color=INK)
        ax.invert_yaxis()
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return to_svg(figure)


def frontier_dots(panels: Mapping[str, Mapping[str, tuple[float, float]]], score: str) -> str:
    """Plot a panel for each cost: a dot for each method; a line with names through the frontier.

    Args:
        panels: (cost, score) by the cost's title and method.
        score: The title of the score.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        axes[0].set_ylabel(score)
        for ax, (title, points) in zip(axes, panels.items(), strict=True):
            best = {method: points[method] for method in frontier(points)}
            ax.plot(*zip(*points.values(), strict=True), ".", color=INK, alpha=0.4, markersize=8)
            ax.plot(*zip(*best.values(), strict=True), ".-", color=PALETTE[0], linewidth=1, drawstyle="steps-post")
            for method, point in best.items():
                ax.annotate(method, point, (4, -10), textcoords="offset points", fontsize=8)
            if least := min((cost for cost, _ in points.values() if cost > 0), default=None):
                ax.set_xscale("symlog", linthresh=least)  # The base alone costs nothing.
                ax.xaxis.set_major_formatter("{x:g}")  # The scale's own formatter writes TeX.
            ax.set_xlabel(title)
            ax.grid(alpha=0.15, color=INK)
        return to_svg(figure)


def _spans(logs: Mapping[str, Log]) -> dict[str, tuple[float, float]]:
    """Return the first and last step of each logged task, counted over the stream."""
    spans, start = {}, 0.0
    for task, log in logs.items():
        if log:
            end = start + log[-1]["step"]
            spans[task] = (start, end)
            start = end
    return spans


def _mark_tasks(ax: Axes, spans: Mapping[str, tuple[float, float]], named: bool) -> None:
    ax.margins(x=0.01)
    ax.grid(axis="y", alpha=0.12, color=INK)
    for _, (_, end) in list(spans.items())[:-1]:
        ax.axvline(end, color=INK, alpha=0.25, linewidth=0.6)
    if named:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.15 * (high - low))  # room for the names
        for task, (start, end) in spans.items():
            position = ((start + end) / 2, 0.97)
            ax.annotate(task, position, xycoords=("data", "axes fraction"), ha="center", va="top", alpha=0.7)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    count = min(len(points), MAX_POINTS)
    edges = [round(index * len(points) / count) for index in range(count + 1)] if count else [0]
    bins = [points[start:end] for start, end in pairwise(edges)]
    means = [[sum(values) / len(values) for values in zip(*part, strict=True)] for part in bins]
    return [x for x, _ in means], [y for _, y in means]


# --- closed questions -------------------------------------------------------------------------------------------------


def curve_plots(curves: Curves) -> str:
    """Plot ROC curves, the reliability diagram and risk over coverage side by side, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * SIDE, SIDE + 0.3), layout="constrained")
        roc, reliability, risk = figure.subplots(1, 3)
        _roc(roc, curves)
        _reliability(reliability, curves)
        _risk(risk, curves)
        if curves.roc:  # below the plots, where many names cover no curve
            figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8, title="ROC of")
        return to_svg(figure)


def _roc(ax: Axes, curves: Curves) -> None:
    ax.set_title("ROC")
    for index, (name, points) in enumerate(curves.roc.items()):
        ax.plot(*zip(*points, strict=True), color=PALETTE[index % len(PALETTE)], label=name[:40])
    _unit_square(ax, "1 - specificity", "sensitivity", diagonal=True)


def _reliability(ax: Axes, curves: Curves) -> None:
    ax.set_title("Reliability")
    confidences = [point.confidence for point in curves.reliability]
    accuracies = [point.accuracy for point in curves.reliability]
    ax.plot(confidences, accuracies, color=PALETTE[0], marker="o", markersize=4)
    _unit_square(ax, "confidence", "share that is right", diagonal=True)


def _risk(ax: Axes, curves: Curves) -> None:
    ax.set_title("Risk and coverage")
    ax.plot(*zip(*curves.risk_coverage, strict=True), color=PALETTE[1])
    _unit_square(ax, "share answered, surest first", "share of these that is wrong")


def _unit_square(ax: Axes, across: str, up: str, diagonal: bool = False) -> None:
    if diagonal:
        ax.plot([0, 1], [0, 1], color=INK, alpha=0.25, linewidth=0.8)
    ax.set(xlabel=across, ylabel=up, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def subgroup_dots(attributes: Mapping[str, AttributeMeasured]) -> str | None:
    """Plot a dot with its interval for each scored group, a row each, in percent; None where none is scored."""
    rows = [
        (f"{name}: {value}"[:40], group.score, group.questions)
        for name, attribute in attributes.items()
        for value, group in attribute.groups.items()
        if group.score is not None
    ]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.26 * len(rows)), layout="constrained")
        ax = figure.subplots()
        for row, (_, score, _) in enumerate(rows):
            if score.interval is not None:
                ax.plot([100 * end for end in score.interval], [row, row], color=PALETTE[0], linewidth=1)
            ax.plot([100 * score.value], [row], ".", color=PALETTE[0], markersize=8)
        ax.set_yticks(range(len(rows)), [f"{name} ({questions})" for name, _, questions in rows])
        ax.set(xlabel="right, %", xlim=(-2, 102))
        ax.grid(axis="x", alpha=0.15, color=INK)
        ax.invert_yaxis()
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """Convert a figure to SVG that takes its text colour and font from the surrounding page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
