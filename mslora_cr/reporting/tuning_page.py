"""The page of a tuning: its trials, the importance of its keys, and the chosen values."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from mslora_cr.reporting.render import render
from mslora_cr.tuning.study import BEST, best_trial, studies

LEAST = 4
"""Plots need at least this many finished trials with different values."""


def write_tuning_page(folder: Path) -> Path:
    """Write `tune.html` of a tuning's folder, and return it."""
    parts = []
    for name, trials in studies(folder).items():
        finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        parts.append(
            {
                "name": name,
                "best": best_trial(trials),
                "trials": sorted(trials, key=lambda trial: trial.number),
                "counts": {state.name.lower(): sum(one.state == state for one in trials) for state in TrialState},
                "plots": _plots(finished),
            }
        )
    context = {"now": datetime.now(UTC), "parts": parts, "best": (folder / BEST).read_text(encoding="utf-8")}
    render("tune.html", folder / "tune.html", context)
    return folder / "tune.html"


def _plots(trials: list[FrozenTrial]) -> dict[str, Markup]:
    """Return importance (by PED-ANOVA) and parallel coordinates, as SVG; None for too few trials."""
    if len({tuple(trial.params.items()) for trial in trials}) < LEAST or len({trial.value for trial in trials}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    drawn = {"Parallel coordinates": optuna.visualization.matplotlib.plot_parallel_coordinate(study)}
    if len(trials[0].params) > 1:
        drawn["Importance"] = optuna.visualization.matplotlib.plot_param_importances(study, evaluator=evaluator)
    return {title: _svg(axes) for title, axes in drawn.items()}


def _svg(axes: matplotlib.axes.Axes) -> Markup:
    buffer = io.StringIO()
    figure: Any = axes.figure
    figure.set_size_inches(9, 4.5)
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    matplotlib.pyplot.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
