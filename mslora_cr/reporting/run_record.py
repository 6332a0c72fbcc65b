"""Reads a run's files for its report: evaluation, ledger, logs, banks, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mslora_cr.config.run_files import BANK_WEIGHTS, CONFIG, EVALUATION, LEDGER
from mslora_cr.evaluation.results import Evaluation, ReportError, read_evaluation
from mslora_cr.evaluation.schemas import ANALYSIS, ROUTED, ROUTING, Analysis, Routing
from mslora_cr.runs.entries import RunLedger
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.state import Part
from mslora_cr.utils.strict_json import JsonError, decode_json

PUBLISHED_SCORES = Path(__file__).with_name("published_scores.yaml")


class PublishedRun(Part):
    """Published scores of a run by task: `exact`, `closed`, `f1`, in percent, where the task has them. `method` is the
    name of its method here."""

    run: str
    method: str
    title: str
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run; `missing` states in words what does not exist.

    Attributes:
        results_dir: The folder from which it was read.
        tasks: Names in stream order.
        modalities: Modalities by task; empty if the run is not evaluated.
        logs: One mapping for each logged step, by task.
        banks: The file of each task's bank weights.
        answers: The file of each task's answers at its own stage.
        config: The text of `config.yaml`, or None.
    """

    name: str
    method: str
    results_dir: Path
    tasks: tuple[str, ...]
    modalities: dict[str, str]
    evaluation: Evaluation | None
    routing: Routing | None
    analysis: Analysis | None
    ledger: RunLedger | None
    logs: dict[str, list[dict[str, float]]]
    banks: dict[str, Path]
    answers: dict[str, Path]
    config: str | None
    missing: list[str]


def read_run(run_dir: Path, results_dir: Path) -> RunRecord:
    """Read whatever a run left in its run folder and its results folder.

    Raises:
        ReportError: Neither a ledger nor an evaluation exists, or answers or scores have changed since.
        StateError: A file is damaged, or of a later version.
    """
    evaluation, ledger = read_evaluation(results_dir), read_ledger(run_dir)
    source = evaluation or ledger
    if source is None:
        raise ReportError(
            f"nothing to report: no {run_dir / LEDGER} and no {results_dir / EVALUATION}; "
            "train the run first, then evaluate it"
        )
    tasks = tuple(source.tasks)
    logs = {task: read_log(path) for task in tasks if (path := run_dir / "logs" / f"{task}.jsonl").is_file()}
    banks = {task: path for task in tasks if (path := run_dir / "banks" / task / BANK_WEIGHTS).is_file()}
    answers = _answer_files(evaluation, results_dir) if evaluation else {}
    config = run_dir / CONFIG
    return RunRecord(
        name=source.run,
        method=source.method,
        results_dir=results_dir,
        tasks=tasks,
        modalities=evaluation.modalities if evaluation else {},
        evaluation=evaluation,
        routing=Routing.read_if_there(results_dir / ROUTED / ROUTING),
        analysis=Analysis.read_if_there(results_dir / ANALYSIS),
        ledger=ledger,
        logs=logs,
        banks=banks,
        answers=answers,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        missing=_missing(tasks, evaluation, ledger, logs, banks, answers),
    )


def read_ledger(run_dir: Path) -> RunLedger | None:
    """Read `ledger.json`; None if nothing was trained.

    Raises:
        StateError: The file is damaged, or of a later version.
    """
    return RunLedger.read_if_there(run_dir / LEDGER)


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the logged steps of a task in order, each with the validation after it. Where a resumed run logged a figure
    again, the later one counts.

    A last line that is cut off, as a killed run leaves it, is skipped.

    Raises:
        ReportError: Another line is not a JSON object with a step; the message names file and line.
    """
    lines = check_regular(path).read_bytes().split(b"\n")
    steps: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = decode_json(line)
            step = _LogStep.model_validate(entry).step
            steps[step] = steps.get(step, {}) | entry
        except (JsonError, ValidationError):
            if number == len(lines):
                continue
            raise ReportError(f"{path}: line {number}: expected a JSON object with a 'step'") from None
    return [steps[step] for step in sorted(steps)]


class _LogStep(BaseModel):
    """A line of a log: numbers by name, with the step among them."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float]

    step: int


def load_published_scores(path: Path = PUBLISHED_SCORES) -> dict[str, PublishedRun]:
    """Read the published runs by kind: `each`, `mslora_cr_ortho`, `mslora_cr_ortho_6task`."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {kind: PublishedRun.model_validate(run) for kind, run in content.items()}


def _answer_files(evaluation: Evaluation, results_dir: Path) -> dict[str, Path]:
    """Return the answers of each task at its own stage, where they still exist."""
    cells = {task: cell for task in evaluation.tasks if (cell := evaluation.own_cell(task))}
    paths = {task: results_dir / cell.answers for task, cell in cells.items()}
    return {task: path for task, path in paths.items() if path.is_file()}


def _missing(
    tasks: Sequence[str],
    evaluation: Evaluation | None,
    ledger: RunLedger | None,
    logs: Mapping[str, Any],
    banks: Mapping[str, Any],
    answers: Mapping[str, Any],
) -> list[str]:
    missing = []
    if ledger is None:
        missing.append("no ledger.json in the run folder: what made the banks is not known")
    if evaluation is None:
        missing.append("the run is not evaluated yet: no scores, no answers")
    parts = {"training log": logs, "bank": banks} | ({"answers at the own stage": answers} if evaluation else {})
    for kind, present in parts.items():
        absent = [task for task in tasks if task not in present]
        missing += [f"no {kind} of {', '.join(absent)}"] if absent else []
    return missing
