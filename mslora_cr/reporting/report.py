"""The report of a run, as one HTML page that needs no network and as Markdown."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mslora_cr.analysis.answered import COMPARED
from mslora_cr.analysis.compare import compare
from mslora_cr.banks.similarity import Similarity, bank_similarity
from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.records import TestRecord
from mslora_cr.data.sources.catalog import catalog
from mslora_cr.data.sources.leaks import Leaks, found_by_check, sentences
from mslora_cr.data.tasks import test_records
from mslora_cr.evaluation.doubts import doubts_in_words
from mslora_cr.evaluation.probe_result import MEASURED, read_probes
from mslora_cr.evaluation.results import Evaluation, ReportError
from mslora_cr.evaluation.schemas import ROUTED, Analysis
from mslora_cr.evaluation.score import AnswerRecord, read_answers
from mslora_cr.metrics.by_class import AUROC, BALANCED
from mslora_cr.metrics.published import score_answers
from mslora_cr.reporting.answers import browsed_answers, browser_data
from mslora_cr.reporting.capacity import answering_rank, bank_ranks, method_named
from mslora_cr.reporting.clinical_cards import clinical_cards
from mslora_cr.reporting.heatmaps import (
    answer_maps,
    confusion_map,
    contribution_map,
    cosine_map,
    matrix_map,
    rank_map,
    similarity_map,
)
from mslora_cr.reporting.plots import VALIDATION_LOSS, logged_terms, loss_curves
from mslora_cr.reporting.render import capital, render
from mslora_cr.reporting.run_record import PUBLISHED_SCORES, PublishedRun, RunRecord, load_published_scores, read_run
from mslora_cr.reporting.shown_to_do import COLUMNS, last_cells, shown_to_do
from mslora_cr.reporting.style import (
    ADDED_TITLES,
    BENCHMARK_TITLES,
    MATRICES,
    PALETTE,
    REPORTED,
    REPORTED_TITLES,
)
from mslora_cr.reporting.thumbnails import thumbnails
from mslora_cr.runs.lock import one_writer
from mslora_cr.statistics.interval import CONFIDENCE, Interval
from mslora_cr.statistics.matrix import TaskStageMatrix
from mslora_cr.statistics.matrix_intervals import MatrixIntervals
from mslora_cr.utils.errors import UserError


def write_report(
    run_dir: Path,
    results_dir: Path,
    config: StreamConfig | None = None,
    published_scores: Path = PUBLISHED_SCORES,
) -> Path:
    """Write `report.html` and `report.md` into the results folder, and return the path of the page.

    The report names whatever the run does not have yet (logs, an evaluation). Where the stream has many images, their
    thumbnails go to `report-images/` beside the page.

    Args:
        config: Says where the images of the questions are. A report without it has no pictures, and does not say what
            `data check` found in both training and testing.

    Raises:
        ReportError: There is neither a ledger nor an evaluation, or a file of the run is malformed.
        DataError, BankError: Answers or banks are malformed.
        LockedError: Another launch writes to the results folder.
    """
    run = read_run(run_dir, results_dir)
    with one_writer(results_dir):
        context = _context(run, load_published_scores(published_scores), config) | _answers(run, config)
        leaks = _leaks(run, config)
        boxes = shown_to_do(last_cells(run.evaluation), results_dir, leaks) if run.evaluation else []
        context |= {"leaks": sentences(leaks), "shown_tasks": boxes, "doubts": _doubts(run, config)}
        for name in ("report.html", "report.md"):
            render(name, results_dir / name, context)
    return results_dir / "report.html"


def _context(
    run: RunRecord, published: Mapping[str, PublishedRun], config: StreamConfig | None = None
) -> dict[str, Any]:
    """Build the context of the templates."""
    modalities, colors = _modality_colors(run), _task_colors(run)
    evaluation, ledger = run.evaluation, run.ledger
    matrices = {key: evaluation.matrix(name) for key, name in MATRICES.items()} if evaluation else {}
    present = {key: matrix for key, matrix in matrices.items() if matrix}
    spans = {key: evaluation.matrix_intervals(run.results_dir, MATRICES[key]) for key in present} if evaluation else {}
    method = method_named(run.method)
    # Banks of different ranks have nothing to compare matrix by matrix.
    one_rank = method is None or len(set(bank_ranks(method, ledger).values())) <= 1
    similarity = bank_similarity(run.banks) if len(run.banks) > 1 and one_rank else None
    curves = loss_curves(run.logs, {task: colors.get(task, PALETTE[0]) for task in run.tasks})
    return {
        "run": run,
        "modalities": modalities,
        "colors": colors,
        "evaluation": evaluation,
        "summed": bool(evaluation and any(len(cell.banks) > 1 for cell in evaluation.cells)),
        "headline": _headline(present, spans),
        "frozen": evaluation.same_banks_since_learned() if evaluation else False,
        "rank": answering_rank(evaluation, ledger) if evaluation else None,
        "published": _published_run(evaluation, published) if evaluation else None,
        "scores": _score_rows(evaluation, published) if evaluation else [],
        "protocol": _benchmark_protocol(config) if config else None,
        "reported": {key: REPORTED_TITLES[key] for key in REPORTED},
        "added": _added_titles(evaluation),
        "shown_columns": COLUMNS,
        "clinical": clinical_cards(evaluation, run.results_dir, _asked(run, config)) if evaluation else [],
        "summaries": [
            (REPORTED_TITLES[key], len(matrix.tasks), matrix.summary(), spans[key].figures)
            for key, matrix in present.items()
        ],
        "maps": [
            matrix_map(capital(REPORTED_TITLES[key]), MATRICES[key], evaluation, spans[key].transfer)
            for key in present
            if evaluation
        ],
        "sites": _site_rows(evaluation, present) if evaluation else [],
        "probes": read_probes(run.results_dir),
        "measured": MEASURED,
        "curves": Markup(curves) if curves else None,
        "validated": any(VALIDATION_LOSS in entry for log in run.logs.values() for entry in log),
        "own_terms": set(logged_terms(run.logs)) - {"ce", "contrastive", "orthogonality"},
        "weights": _last_weights(run),
        "routing": _routing(run) if run.routing else None,
        "analysis": _analysis(run.analysis) if run.analysis else None,
        "similarity": similarity_map(similarity) if similarity else None,
        "kinship": _kinship(similarity, run.modalities) if similarity else None,
        "examples": {task: pick_examples(read_answers(path)) for task, path in run.answers.items()},
        "provenance": {
            "training": {"hardware": ledger.hardware, "versions": ledger.versions, "git": ledger.git or {}}
            if ledger
            else {},
            "evaluation": evaluation.environment if evaluation else {},
        },
        "confidence": CONFIDENCE,
        "now": datetime.now(UTC),
    }


def _asked(run: RunRecord, config: StreamConfig | None) -> dict[str, Sequence[TestRecord]]:
    """Return the questions whose records name attributes, by task, as far as their files are still those that were
    asked."""
    asked: dict[str, Sequence[TestRecord]] = {}
    for cell in last_cells(run.evaluation) if run.evaluation and config else ():
        try:
            records = test_records(config, config.task(cell.task)) if config else None
        except UserError:
            continue
        if records is not None and records.digest == cell.questions and any(one.attributes for one in records):
            asked[cell.task] = list(records)
    return asked


def _answers(run: RunRecord, config: StreamConfig | None) -> dict[str, Any]:
    """Return the data of the browser of answers, the tables of confusions, and what is missing in either."""
    if run.evaluation is None:
        return {"browser": None, "confusions": [], "missing": run.missing}
    browsed = browsed_answers(run.evaluation, run.results_dir, config)
    pictures = list(dict.fromkeys(path for task in browsed.tasks for paths in task.pictures for path in paths))
    small, unread = thumbnails(pictures, run.results_dir)
    damaged = [f"{len(unread)} images that cannot be read, such as {unread[0]}"] if unread else []
    data = browser_data(browsed.tasks, _task_colors(run), small, len(run.tasks))
    maps = [confusion for task in browsed.tasks for confusion in answer_maps(task, len(run.tasks))]
    return {
        "browser": data if browsed.tasks else None,
        "confusions": maps,
        "missing": run.missing + browsed.missing + damaged,
    }


def _leaks(run: RunRecord, config: StreamConfig | None) -> dict[str, Leaks]:
    """Return what `data check` found in both training and testing, by task."""
    if run.evaluation is None or config is None:
        return {}
    return found_by_check(config, {cell.task: cell.questions for cell in run.evaluation.cells})


def _doubts(run: RunRecord, config: StreamConfig | None) -> dict[str, list[str]]:
    """Return what a reader must know about the answers of each task after its last evaluated stage."""
    limit = config.evaluation.max_new_tokens if config else None
    cells = last_cells(run.evaluation) if run.evaluation else []
    doubts = {f"{cell.task}, stage {cell.stage}": doubts_in_words(cell, limit) for cell in cells}
    return {place: words for place, words in doubts.items() if words}


def _task_colors(run: RunRecord) -> dict[str, str]:
    modalities = _modality_colors(run)
    return {task: modalities[modality] for task, modality in run.modalities.items()}


def _modality_colors(run: RunRecord) -> dict[str, str]:
    modalities = dict.fromkeys(run.modalities.values())
    return {modality: PALETTE[index % len(PALETTE)] for index, modality in enumerate(modalities)}


def _headline(matrices: Mapping[str, TaskStageMatrix], spans: Mapping[str, MatrixIntervals]) -> dict[str, Any] | None:
    """Return the first metric that the run has, with its figures and their intervals."""
    for key, matrix in matrices.items():
        return {
            "title": REPORTED_TITLES[key],
            "tasks": len(matrix.tasks),
            "spans": spans[key].figures,
            **matrix.summary(),
        }
    return None


def _published_run(evaluation: Evaluation, runs: Mapping[str, PublishedRun]) -> PublishedRun | None:
    """Return the published run to show next to this one: `each` for `each`, MSLoRA-CR for every other method (no other
    scores are published), the run of six tasks if these are its tasks. None where no task has the published
    questions."""
    tasks = {name for name in evaluation.published.values() if name}
    if not any(_asked_as_published(evaluation, task) for task in evaluation.tasks):
        return None
    if evaluation.method == "each":
        return runs["each"]
    six = runs["mslora_cr_ortho_6task"]
    return six if tasks == set(six.scores) else runs["mslora_cr_ortho"]


def _asked_as_published(evaluation: Evaluation, task: str) -> bool:
    """Return whether a task has the published number of questions. A data set in the published place may be another
    one, such as the demo's, to which no published score belongs."""
    name, cell = evaluation.published.get(task), evaluation.own_cell(task)
    if name is None or cell is None or name not in catalog():
        return False
    rows = catalog()[name].test_rows
    return cell.rows == rows.open + rows.closed


class ScoreRow(NamedTuple):
    """Return a task at its own stage: the banks that answered, its scores in the order of REPORTED, each with its
    interval and the published score, and those of `_added_titles` with their intervals; None where there is none."""

    task: str
    rows: int | None
    banks: str
    scores: list[tuple[float | None, Interval | None, float | None]]
    added: list[tuple[float | None, Interval | None]]


def _added_titles(evaluation: Evaluation | None) -> dict[str, str]:
    """Return the titles, by metric, of the scores that the published evaluation does not have."""
    measured = {name for cell in evaluation.cells for name in cell.metrics} if evaluation else set()
    return {name: title for name, title in (BENCHMARK_TITLES | ADDED_TITLES).items() if name in measured}


def _benchmark_protocol(config: StreamConfig) -> str | None:
    """Return how far the run follows the protocol of CoIN, UCIT and MLLM-CL; None if no task is one of theirs."""
    if not any(task.benchmark for task in config.stream):
        return None
    if config.lora.projector_learning_rate is None:
        return (
            "The benchmarks also train the projector between tower and language model. Here it was frozen, so these "
            "figures do not compare with theirs."
        )
    return (
        "The projector was trained with every bank, as in the benchmarks' published protocol. Pictures are prepared by "
        "the base model's processor, which pads them to squares, as published, if its settings say do_pad."
    )


def _score_rows(evaluation: Evaluation, published: Mapping[str, PublishedRun]) -> list[ScoreRow]:
    reference = _published_run(evaluation, published)
    rows = []
    for task in evaluation.tasks:
        cell = evaluation.own_cell(task)
        comparable = reference is not None and _asked_as_published(evaluation, task)
        theirs = reference.scores.get(evaluation.published[task] or "", {}) if reference and comparable else {}
        ours, spans = (cell.metrics, cell.intervals) if cell else ({}, {})
        rows.append(
            ScoreRow(
                task,
                rows=cell.rows if cell else None,
                banks=evaluation.bank_numbers(cell) if cell else "–",
                scores=[(ours.get(name), spans.get(name), theirs.get(key)) for key, name in REPORTED.items()],
                added=[(ours.get(name), spans.get(name)) for name in _added_titles(evaluation)],
            )
        )
    return rows


class SiteRow(NamedTuple):
    """A task at one of several sites: its score in percent before it was learned, at its own stage and after the last
    one, and how much it forgot, in points; None where that was not evaluated."""

    first_site: str
    task: str
    metric: str
    before: float | None
    learned: float | None
    last: float | None
    forgotten: float | None


def _site_rows(evaluation: Evaluation, matrices: Mapping[str, TaskStageMatrix]) -> list[SiteRow]:
    """Return the tasks that several sites have, site by site."""
    first = {task: evaluation.same_as.get(task, task) for task in evaluation.tasks}
    several = dict.fromkeys(evaluation.same_as.values())
    return [
        SiteRow(name, task, REPORTED_TITLES[key], *matrix.life_of(task))
        for name in several
        for key, matrix in matrices.items()
        for task in matrix.tasks
        if first[task] == name
    ]


def _routing(run: RunRecord) -> dict[str, Any]:
    """Return the router's decisions after the last evaluated stage, and the cost of task-agnostic answers."""
    assert run.routing is not None
    last = run.routing.stages[-1]
    context: dict[str, Any] = {"last": last, "stages": run.routing.stages, "map": confusion_map(last)}
    try:
        runs = {"task-aware": run.results_dir, "task-agnostic": run.results_dir / ROUTED}
        cost = compare(runs, titles=(*COMPARED, BALANCED, AUROC))
        return context | {"cost": cost.metrics, "why": None}
    except ReportError as error:
        return context | {"cost": {}, "why": str(error)}


def _analysis(analysis: Analysis) -> dict[str, Any]:
    """Read `analysis.json`, and build its tables."""
    cosines, contribution = analysis.similarity, analysis.contribution
    by_title = {"By decoder layer": cosines.by_layer, "By module": cosines.by_module}
    return {
        "cosines": [cosine_map(title, cosines.banks, values) for title, values in by_title.items()],
        "ranks": rank_map(analysis.effective_rank),
        "contribution": contribution,
        "contribution_map": contribution_map(contribution.rows) if contribution else None,
        "changed": analysis.changed,
    }


def _last_weights(run: RunRecord) -> dict[str, float]:
    """Return the penalties' weights as last logged."""
    entries = [entry for log in run.logs.values() for entry in log]
    return {name: entry[name] for name in ("alpha", "beta") for entry in entries if name in entry}


def _kinship(similarity: Similarity, modalities: Mapping[str, str]) -> dict[str, float] | None:
    """Return the mean similarity of banks of one modality, and of banks of different ones."""
    pairs: dict[str, list[float]] = {"same": [], "other": []}
    for index, first in enumerate(similarity.banks):
        for other, second in enumerate(similarity.banks[:index]):
            kind = "same" if modalities.get(first) == modalities.get(second) else "other"
            pairs[kind].append(similarity.values[index][other])
    if not modalities or not all(pairs.values()):
        return None
    return {kind: sum(values) / len(values) for kind, values in pairs.items()}


class Example(NamedTuple):
    """An answered question, and whether the answer counts as a hit."""

    question: str
    answer: str
    truth: str
    hit: bool


def pick_examples(answers: Sequence[AnswerRecord], of_each: int = 2) -> list[Example]:
    """Return up to `of_each` right and as many wrong answers, the same ones at every call; right ones come first."""
    picked: dict[bool, list[Example]] = {True: [], False: []}
    for answer in random.Random(0).sample(answers, len(answers)):
        if all(len(examples) == of_each for examples in picked.values()):
            break
        hit = score_answers([answer]).rows[0].hit
        if len(picked[hit]) < of_each:
            picked[hit].append(Example(answer.prompt, str(answer.text), str(answer.gt), hit))
    return picked[True] + picked[False]
