"""The gate: whether an update of a stream may ship, by the plan that was registered before it was trained.

Every earlier task is tested against the stage at which it was learned, never against the predecessor: with the
predecessor as reference, small losses add up release by release. Every test must pass (an intersection-union test), so
the number of tasks needs no correction; the number of candidates does, and each spends its part of the plan's level.
Sources: Berger, "Multiparameter Hypothesis Testing and Acceptance Sampling", Technometrics 1982; Feng, Emerson and
Simon, "Approval Policies for Modifications to Machine Learning-Based Software as a Medical Device", Biometrics 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from mslora_cr.evaluation.probe_result import PROBE, Probe
from mslora_cr.evaluation.results import Cell, Evaluation, ReportError, column_of, required_evaluation
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.release.plan import Plan
from mslora_cr.statistics.matrix_intervals import Column, coarsest, is_binary
from mslora_cr.statistics.noninferiority import NonInferiority, non_inferiority
from mslora_cr.utils.files import file_digest
from mslora_cr.utils.state import Part

Verdict = Literal["release", "hold", "reject"]
Outcome = Literal["pass", "hold", "fail"]


class GateTest(Part):
    """One test of a gate, in points.

    Attributes:
        what: `earlier task`, `new task` or `probe`.
        name: The task, or the held-out data set.
        outcome: `pass`; `hold`, where too few patients leave it open; `fail`.
        reason: The outcome in words.
        required: What the lower bound must exceed: minus the margin, or the required score.
        reference: The score that the new one is compared with, in percent; None for a required score.
        score: The score of the update, in percent.
        difference: The score less its reference, or less the required score.
        bound: The one-sided lower bound of the difference.
        level: The level of the test.
        p: The p-value.
        questions: How many questions were answered.
        groups: How many of them are independent, by patient or image.
        gained: How many score higher than in the reference.
        lost: How many score lower.
        needed: How many groups would pass with a power of 80 % if nothing else changes; None where no number would.
    """

    what: Literal["earlier task", "new task", "probe"]
    name: str
    outcome: Outcome
    reason: str
    required: float
    reference: float | None
    score: float
    difference: float
    bound: float
    level: float
    p: float
    questions: int
    groups: int
    gained: int
    lost: int
    needed: int | None


def gate_tests(plan: Plan, results_dir: Path, level: float) -> list[GateTest]:
    """Run all tests of an evaluated run: its earlier tasks, its newest task and the plan's probes.

    Args:
        results_dir: The results folder of the run, evaluated with `--stages seen` (or `all`).
        level: The one-sided level of each test.

    Raises:
        ReportError: A score that the plan asks for does not exist; the message names the command that makes it.
        DataError: The scores of a cell are gone.
    """
    evaluation = required_evaluation(results_dir)
    *earlier, newest = evaluation.tasks
    tests = [_earlier(plan, evaluation, results_dir, task, level) for task in earlier]
    tests += _newest(plan, evaluation, results_dir, newest, level)
    tests += [_probe(plan, results_dir, name, level) for name in plan.probes]
    return tests


def verdict_of(tests: Sequence[GateTest]) -> Verdict:
    """Return `reject` if a test failed, else `hold` if one is open, else `release`."""
    outcomes = {test.outcome for test in tests}
    return "reject" if "fail" in outcomes else "hold" if "hold" in outcomes else "release"


def _earlier(plan: Plan, evaluation: Evaluation, folder: Path, task: str, level: float) -> GateTest:
    learned, now = evaluation.own_cell(task), evaluation.last_cell(task)
    if learned is None or now is None:
        raise ReportError(
            f"{task} has no answers at the stage at which it was learned, or none after the last one; run "
            "`mslora-cr evaluate CONFIG --stages seen`"
        )
    return _paired(plan, "earlier task", task, folder, learned, now, plan.margin_of(task), level)


def _newest(plan: Plan, evaluation: Evaluation, folder: Path, task: str, level: float) -> Iterator[GateTest]:
    cell = evaluation.last_cell(task)
    if cell is None:
        raise ReportError(f"{task}, the newest task, is not evaluated; run `mslora-cr evaluate CONFIG --stages seen`")
    if plan.new_task.least_score is not None:
        column = _column(plan, folder, cell)
        required = plan.new_task.least_score / 100
        # The score less a constant: its lower bound exceeds zero where that of the score exceeds what is required.
        comparison = non_inferiority(column.scores - required, column.groups, 0.0, level, binary=False)
        yield _test(plan, "new task", task, comparison, None, float(column.scores.mean()), 0.0, level)
    if plan.new_task.better_than_base:
        base = next((cell for cell in evaluation.cells if cell.key == (task, 0)), None)
        if base is None:
            raise ReportError(f"{task} is not answered by the base model; run `mslora-cr evaluate CONFIG --stages all`")
        yield _paired(plan, "new task", task, folder, base, cell, 0.0, level)


def _probe(plan: Plan, results_dir: Path, name: str, level: float) -> GateTest:
    folder = results_dir / PROBE / name
    probe = Probe.read_if_there(folder / f"{PROBE}.json")
    if probe is None:
        raise ReportError(f"the plan names the probe {name}; run `mslora-cr evaluate CONFIG --probe {name}`")
    base, last = probe.cells[0], probe.cells[-1]
    return _paired(plan, "probe", name, folder, base, last, plan.probes[name], level)


def _paired(
    plan: Plan,
    what: Literal["earlier task", "new task", "probe"],
    name: str,
    folder: Path,
    before: Cell,
    after: Cell,
    margin: float,
    level: float,
) -> GateTest:
    if before.questions != after.questions:
        raise ReportError(f"{name} was asked different questions at stages {before.stage} and {after.stage}")
    columns = [_column(plan, folder, cell) for cell in (before, after)]
    values = columns[1].scores - columns[0].scores
    binary = all(is_binary(column.scores) for column in columns)
    comparison = non_inferiority(values, coarsest([column.groups for column in columns]), margin / 100, level, binary)
    scores = [float(column.scores.mean()) for column in columns]
    return _test(plan, what, name, comparison, scores[0], scores[1], -margin, level)


def _test(
    plan: Plan,
    what: Literal["earlier task", "new task", "probe"],
    name: str,
    comparison: NonInferiority,
    reference: float | None,
    score: float,
    required: float,
    level: float,
) -> GateTest:
    outcome, reason = _outcome(plan, comparison, required, what)
    return GateTest(
        what=what,
        name=name,
        outcome=outcome,
        reason=reason,
        required=required,
        reference=None if reference is None else 100 * reference,
        score=100 * score,
        difference=100 * comparison.difference,
        bound=100 * comparison.bound,
        level=level,
        p=comparison.p,
        questions=comparison.questions,
        groups=comparison.groups,
        gained=comparison.gained,
        lost=comparison.lost,
        needed=comparison.needed,
    )


def _outcome(plan: Plan, comparison: NonInferiority, required: float, what: str) -> tuple[Outcome, str]:
    """Return the outcome of a test and its reason. The test passes by its p-value. It fails where the difference is at
    or beyond the requirement, since no number of patients would help. Between the two it is open."""
    limit = f"{required:+.1f} points" if what != "new task" else "what is required"
    if comparison.groups < plan.least_patients:
        return "hold", f"{comparison.groups} independent patients or images; the plan asks for {plan.least_patients}"
    if 100 * comparison.bound > required:
        return "pass", f"the lower bound {100 * comparison.bound:+.2f} is above {limit}"
    if comparison.needed is None:
        return "fail", f"the difference {100 * comparison.difference:+.2f} is not above {limit}"
    more = max(1, comparison.needed - comparison.groups)
    return "hold", f"the lower bound {100 * comparison.bound:+.2f} is not above {limit}; about {more:,} more would tell"


def _column(plan: Plan, folder: Path, cell: Cell) -> Column:
    """Return the scores of a cell in the plan's metric."""
    path = (folder / cell.answers).with_name(SCORES)
    table = read_scores(path)
    if cell.scores_sha256 is not None and file_digest(path) != cell.scores_sha256:
        raise ReportError(f"{path} was changed since it was scored; evaluate that run again")
    column = column_of(table, plan.metric)
    if not len(column.scores):
        there = ", ".join(table.columns)
        raise ReportError(f"{cell.task} has no {plan.metric!r} at stage {cell.stage}; there are {there}")
    return column
