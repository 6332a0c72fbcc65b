"""Plots of a task's closed questions: ROC, reliability, risk over coverage, and scores by subgroup."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mslora_cr.clinical.file import AttributeMeasured, Curves
from mslora_cr.reporting.plots import INK, STYLE, to_svg
from mslora_cr.reporting.style import PALETTE

SIDE = 3.0
"""Inches of a square panel."""


def curve_plots(curves: Curves) -> str:
    """ROC curves, the reliability diagram and risk over coverage side by side, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * SIDE, SIDE + 0.3), layout="constrained")
        roc, reliability, risk = figure.subplots(1, 3)
        _roc(roc, curves)
        _reliability(reliability, curves)
        _risk(risk, curves)
        return to_svg(figure)


def _roc(ax: Axes, curves: Curves) -> None:
    ax.set_title("ROC")
    for index, (name, points) in enumerate(curves.roc.items()):
        ax.plot(*zip(*points, strict=True), color=PALETTE[index % len(PALETTE)], label=name[:24])
    _unit_square(ax, "1 - specificity", "sensitivity", diagonal=True)
    if curves.roc:
        ax.legend(frameon=False, loc="lower right", fontsize=8)


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
    """A dot with its interval for each group that is scored, a row each, in percent; None where none is."""
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
        for place, (_, score, _) in enumerate(rows):
            if score.interval is not None:
                ax.plot([100 * end for end in score.interval], [place, place], color=PALETTE[0], linewidth=1)
            ax.plot([100 * score.value], [place], ".", color=PALETTE[0], markersize=8)
        ax.set_yticks(range(len(rows)), [f"{name} ({questions})" for name, _, questions in rows])
        ax.set(xlabel="right, %", xlim=(-2, 102))
        ax.grid(axis="x", alpha=0.15, color=INK)
        ax.invert_yaxis()
        return to_svg(figure)
