"""The report of a run, as one self-contained HTML page and as Markdown, and the comparison of several
runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mslora_cr.banks.similarity import Similarity
from mslora_cr.evaluation import intervals
from mslora_cr.evaluation.compare import compare
from mslora_cr.evaluation.intervals import span
from mslora_cr.evaluation.matrix import TaskStageMatrix
from mslora_cr.evaluation.results import ROUTED, Evaluation, MatrixIntervals, ReportError, required_evaluation
from mslora_cr.reporting.heatmaps import (
    confusion_map,
    contribution_map,
    cosine_map,
    final_scores_map,
    matrix_map,
    rank_map,
    similarity_map,
)
from mslora_cr.reporting.plots import loss_curves, stage_curves, sweep_dots
from mslora_cr.reporting.run_record import (
    PUBLISHED_SCORES,
    PublishedRun,
    RunRecord,
    load_published_scores,
    read_ledger,
    read_run,
)
from mslora_cr.utils.files import replacing

METRICS = {"closed": "close accuracy", "f1": "f1 score", "exact": "exact match score"}
"""Name in `published_scores.yaml` → name in `metrics.json`; the first that a run has is its headline."""
TITLES = {"closed": "closed accuracy", "f1": "F1 of open answers", "exact": "exact match"}
ADDED_TITLES = {"rouge-l": "ROUGE-L", "token recall": "token recall"}
"""Title by name in `metrics.json` of what the published evaluation does not measure."""
PALETTE = ("#2f7fd6", "#d97a2b", "#2f9e6e", "#a65cc9", "#c94f6d", "#8a8f2a")
"""Colours that read on white and on black alike."""


def write_report(run_dir: Path, results_dir: Path, published_scores: Path = PUBLISHED_SCORES) -> Path:
    """Write `report.html` and `report.md` into the results folder, and return the path of the page.

    Whatever the run does not have yet (logs, an evaluation) is named in the report.

    Raises:
        ReportError: there is neither a ledger nor an evaluation, or a file of the run is malformed.
        DataError: an answer file is malformed.
    """
    context = _context(read_run(run_dir, results_dir), load_published_scores(published_scores))
    results_dir.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "report.md"):
        _render(name, results_dir / name, context)
    return results_dir / "report.html"


def write_comparison(runs: Sequence[tuple[str, Path, Path]], output: Path) -> Path:
    """Write one page that sets several runs of one stream side by side, and return its path.

    Args:
        runs: for each a label, its run folder and its results folder; the report there is linked.
        output: the page to write.

    Raises:
        ReportError: a run is not evaluated, has nothing in common with the others, or a file of it is
        malformed.
    """
    colors = {label: PALETTE[index % len(PALETTE)] for index, (label, _, _) in enumerate(runs)}
    evaluations = {label: required_evaluation(results_dir) for label, _, results_dir in runs}
    key = next((key for key in METRICS if all(run.matrix(METRICS[key]) for run in evaluations.values())), None)
    if key is None:
        raise ReportError(f"the runs {', '.join(evaluations)} have no metric in common; evaluate each of them")
    matrices = {label: matrix for label, run in evaluations.items() if (matrix := run.matrix(METRICS[key]))}
    spans = {label: evaluations[label].matrix_intervals(folder, METRICS[key]) for label, _, folder in runs}
    compared = [
        {
            "label": label,
            "method": evaluations[label].method,
            "color": colors[label],
            "link": os.path.relpath(results_dir / "report.html", output.parent),
            "summary": matrices[label].summary(),
            "intervals": spans[label].figures,
            "banks_by": evaluations[label].banks_by,
            "told": evaluations[label].same_banks_since_learned(),
            "map": matrix_map(label, METRICS[key], evaluations[label], spans[label].lost),
            "seconds": ledger.seconds if (ledger := read_ledger(run_dir)) else None,
        }
        for label, run_dir, results_dir in runs
    ]
    curves = {label: points for label, matrix in matrices.items() if (points := matrix.stage_averages())}
    bands = {label: found.stages for label, found in spans.items()}
    context = {
        "runs": compared,
        "metric": TITLES[key],
        "curves": Markup(stage_curves(curves, bands, colors, f"{TITLES[key]}, %")) if curves else None,
        "final": final_scores_map(evaluations, METRICS[key]),
        "bootstrap": intervals,
        "now": datetime.now(UTC),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    _render("comparison.html", output, context)
    return output


SWEEP_PANELS = {"final_average": "final average, %", "forgetting": "forgetting, points"}
SWEEP_COLUMNS = {
    "final_average": "Final average",
    "average_incremental_accuracy": "Incremental",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
}


def write_sweep_page(found: Mapping[str, Any], output: Path) -> Path:
    """Write `sweep.html`, `sweep.md` and `sweep.svg` of a sweep into a folder, and return the page's path.

    Args:
        found: the content of `sweep.json`.
    """
    colors = {order: PALETTE[index % len(PALETTE)] for index, order in enumerate(found["orders"])}
    headline = next((key for key in METRICS if found["metrics"][key]), None)
    if headline is None:
        raise ReportError("the runs of this sweep have no metric in common")
    panels = {
        title: {
            method: points
            for method in found["metrics"][headline]
            if (points := _sweep_points(found["runs"], method, headline, figure))
        }
        for figure, title in SWEEP_PANELS.items()
    }
    plot = sweep_dots({title: panel for title, panel in panels.items() if panel}, colors)
    (output / "sweep.svg").write_text(plot, encoding="utf-8")
    context = {
        "found": found,
        "metrics": {TITLES[key]: methods for key, methods in found["metrics"].items() if methods},
        "headline": TITLES[headline],
        "columns": SWEEP_COLUMNS,
        "banks_by": {run["method"]: run["banks_by"] for run in found["runs"]},
        "told": sorted({run["method"] for run in found["runs"] if run["told"]}),
        "plot": Markup(plot),
        "now": datetime.now(UTC),
    }
    for name in ("sweep.html", "sweep.md"):
        _render(name, output / name, context)
    return output / "sweep.html"


def _sweep_points(runs: Sequence[Mapping[str, Any]], method: str, metric: str, figure: str) -> list[tuple[str, float]]:
    """(order, value) of each run of a method that has the figure."""
    values = [
        (str(run["order"]), run["figures"].get(metric, {}).get(figure)) for run in runs if run["method"] == method
    ]
    return [(order, value) for order, value in values if value is not None]


def _context(run: RunRecord, published: Mapping[str, PublishedRun]) -> dict[str, Any]:
    """What the templates show."""
    modalities = _modality_colors(run)
    colors = {task: modalities[modality] for task, modality in run.modalities.items()}
    evaluation, ledger = run.evaluation, run.ledger
    matrices = {key: evaluation.matrix(name) for key, name in METRICS.items()} if evaluation else {}
    present = {key: matrix for key, matrix in matrices.items() if matrix}
    spans = {key: evaluation.matrix_intervals(run.results_dir, METRICS[key]) for key in present} if evaluation else {}
    curves = loss_curves(run.logs, {task: colors.get(task, PALETTE[0]) for task in run.tasks})
    return {
        "run": run,
        "modalities": modalities,
        "colors": colors,
        "evaluation": evaluation,
        "summed": bool(evaluation and any(len(cell.banks) > 1 for cell in evaluation.cells)),
        "headline": _headline(present, spans),
        "told": evaluation.same_banks_since_learned() if evaluation else False,
        "published": _published_run(evaluation, published) if evaluation else None,
        "scores": _score_rows(evaluation, published) if evaluation else [],
        "added": ADDED_TITLES,
        "summaries": [
            (TITLES[key], len(matrix.tasks), matrix.summary(), spans[key].figures) for key, matrix in present.items()
        ],
        "maps": [
            matrix_map(_capital(TITLES[key]), METRICS[key], evaluation, spans[key].lost)
            for key in present
            if evaluation
        ],
        "curves": Markup(curves) if curves else None,
        "weights": _last_weights(run),
        "routing": _routing(run) if run.routing else None,
        "analysis": _analysis(run.analysis) if run.analysis else None,
        "similarity": similarity_map(run.similarity) if run.similarity else None,
        "kinship": _kinship(run.similarity, run.modalities) if run.similarity else None,
        "provenance": {
            "training": {"hardware": ledger.hardware, "versions": ledger.versions, "git": ledger.git or {}}
            if ledger
            else {},
            "evaluation": evaluation.environment if evaluation else {},
        },
        "bootstrap": intervals,
        "now": datetime.now(UTC),
    }


def _modality_colors(run: RunRecord) -> dict[str, str]:
    modalities = dict.fromkeys(run.modalities.values())
    return {modality: PALETTE[index % len(PALETTE)] for index, modality in enumerate(modalities)}


def _headline(matrices: Mapping[str, TaskStageMatrix], spans: Mapping[str, MatrixIntervals]) -> dict[str, Any] | None:
    """The first metric that the run has, with its figures and their intervals."""
    for key, matrix in matrices.items():
        return {"title": TITLES[key], "tasks": len(matrix.tasks), "spans": spans[key].figures, **matrix.summary()}
    return None


def _published_run(evaluation: Evaluation, runs: Mapping[str, PublishedRun]) -> PublishedRun | None:
    """The published run to show beside this one: `each` beside `each`, MSLoRA-CR beside every other method (no other's
    scores are published), the run of six tasks if these are its tasks."""
    tasks = {name for name in evaluation.published.values() if name}
    if not tasks:
        return None
    if evaluation.method == "each":
        return runs["each"]
    six = runs["mslora_cr_ortho_6task"]
    return six if tasks == set(six.scores) else runs["mslora_cr_ortho"]


def _score_rows(evaluation: Evaluation, published: Mapping[str, PublishedRun]) -> list[dict[str, Any]]:
    """Each task at its own stage: the banks that answered, and its scores in the order of METRICS and ADDED_TITLES,
    each with its interval and, for the former, the published one or None."""
    beside = _published_run(evaluation, published)
    rows = []
    for task in evaluation.tasks:
        cell = evaluation.own_cell(task)
        theirs = beside.scores.get(evaluation.published.get(task) or "", {}) if beside else {}
        ours, spans = (cell.metrics, cell.intervals) if cell else ({}, {})
        rows.append(
            {
                "task": task,
                "rows": cell.rows if cell else None,
                "banks": evaluation.bank_numbers(cell) if cell else "–",
                "scores": [(ours.get(name), spans.get(name), theirs.get(key)) for key, name in METRICS.items()],
                "added": [(ours.get(name), spans.get(name)) for name in ADDED_TITLES],
            }
        )
    return rows


def _routing(run: RunRecord) -> dict[str, Any]:
    """What the router did after the last stage that it was asked at, and what that costs against being told."""
    assert run.routing is not None
    last = run.routing.stages[-1]
    context: dict[str, Any] = {"last": last, "stages": run.routing.stages, "map": confusion_map(last)}
    try:
        cost = compare({"told": run.results_dir, "routed": run.results_dir / ROUTED})
        return context | {"cost": cost["metrics"], "why": None}
    except ReportError as error:
        return context | {"cost": {}, "why": str(error)}


def _analysis(found: Mapping[str, Any]) -> dict[str, Any]:
    """`analysis.json` as tables."""
    similarity, contribution = found["similarity"], found["contribution"]
    places = {"By decoder layer": "by_layer", "By module": "by_module"}
    return {
        "cosines": [cosine_map(title, similarity["banks"], similarity[place]) for title, place in places.items()],
        "ranks": rank_map(found["effective_rank"]),
        "contribution": contribution,
        "contribution_map": contribution_map(contribution["rows"]) if contribution else None,
        "changed": found["changed"],
    }


def _last_weights(run: RunRecord) -> dict[str, float]:
    """The penalties' weights as last logged."""
    entries = [entry for log in run.logs.values() for entry in log]
    return {name: entry[name] for name in ("alpha", "beta") for entry in entries if name in entry}


def _kinship(similarity: Similarity, modalities: Mapping[str, str]) -> dict[str, float] | None:
    """Mean similarity of banks of one modality, and of banks of different ones."""
    pairs: dict[str, list[float]] = {"same": [], "other": []}
    for index, first in enumerate(similarity.banks):
        for other, second in enumerate(similarity.banks[:index]):
            kind = "same" if modalities.get(first) == modalities.get(second) else "other"
            pairs[kind].append(similarity.values[index][other])
    if not modalities or not all(pairs.values()):
        return None
    return {kind: sum(values) / len(values) for kind, values in pairs.items()}


def _render(template: str, path: Path, context: Mapping[str, Any]) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "span": span,
        "duration": _duration,
        "capital": _capital,
        "flat": _flat,
        "cell": _markdown_cell,
    }
    text = environment.get_template(f"{template}.j2").render(context)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _number(value: float | None, digits: int = 1) -> str:
    # Adding zero turns -0.0, which rounding leaves, into 0.0.
    return "–" if value is None else f"{round(value, digits) + 0:.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as lines of a table."""
    lines: dict[str, str] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            lines |= _flat(value, f"{prefix}{name} · ")
        elif isinstance(value, list):
            lines[f"{prefix}{name}"] = ", ".join(map(str, value)) or "none"
        elif value is not None:
            lines[f"{prefix}{name}"] = str(value)
    return lines


def _markdown_cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table, and shows as it is."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]<>|#" else mark for mark in text)
    return " ".join(escaped.split())
