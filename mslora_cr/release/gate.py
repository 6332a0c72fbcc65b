"""The gate: whether an update of a stream may ship, by the plan that was registered before it was trained.

Every earlier task is tested against the stage at which it was learned, never against the predecessor: with the
predecessor as reference, small losses add up release by release. Every test must pass (an intersection-union test), so
the number of tasks needs no correction; the number of candidates does, and each spends its part of the plan's level.
Sources: Berger, "Multiparameter Hypothesis Testing and Acceptance Sampling", Technometrics 1982; Feng, Emerson and
Simon, "Approval Policies for Modifications to Machine Learning-Based Software as a Medical Device", Biometrics 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mslora_cr.data.records import TestRecords
from mslora_cr.evaluation.probe_result import PROBE, Probe
from mslora_cr.evaluation.results import Cell, Evaluation, ReportError, required_evaluation
from mslora_cr.evaluation.schemas import ROUTED
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.release.criteria import calibration_tests, foreign_tests
from mslora_cr.release.gate_test import GateTest, Outcome, Tested, Verdict, too_few
from mslora_cr.release.plan import Plan
from mslora_cr.statistics.intervals import Groups, Scores
from mslora_cr.statistics.matrix_intervals import coarsest, is_binary
from mslora_cr.statistics.noninferiority import NonInferiority, non_inferiority
from mslora_cr.statistics.subgroups import banded
from mslora_cr.utils.files import file_digest


def gate_tests(plan: Plan, results_dir: Path, level: float, questions: Callable[[str], TestRecords]) -> list[GateTest]:
    """Run all tests of an evaluated run: its earlier tasks and their subgroups, its newest task, the plan's probes,
    calibration and foreign questions.

    Args:
        results_dir: The results folder of the run, evaluated with `--stages seen` (or `all`).
        level: The one-sided level of each test that has the plan's level.
        questions: Gives a task's test records.

    Raises:
        ReportError: A score that the plan asks for does not exist; the message names the command that makes it.
        DataError: The scores of a cell are gone, or test records cannot be read.
    """
    judged = results_dir / ROUTED if plan.routed else results_dir
    evaluation = required_evaluation(judged)
    *earlier, newest = evaluation.tasks
    tests: list[GateTest] = []
    for task in earlier:
        before, after = _earlier(plan, evaluation, judged, task)
        test_level = level * plan.share_of_level(plan.tasks.get(task))
        tests.append(
            _paired(plan.least_patients, "earlier task", task, before, after, plan.margin_of(task), test_level)
        )
        tests += _subgroups(plan, task, before, after, level, questions)
    if plan.subgroups and earlier and not any(test.what == "subgroup" for test in tests):
        raise ReportError(f"no test record of an earlier task has the attribute {', '.join(plan.subgroups)}")
    tests += _newest(plan, evaluation, judged, results_dir, newest, level)
    tests += [_probe(plan, results_dir, name, level) for name in plan.probes]
    if plan.calibration is not None:
        tests += calibration_tests(plan, evaluation, judged, level, questions)
    if plan.foreign is not None:
        tests += foreign_tests(plan, results_dir / ROUTED, level)
    return tests


def verdict_of(tests: Sequence[GateTest]) -> Verdict:
    """Return `reject` if a test failed, else `hold` if one is open, else `release`."""
    outcomes = {test.outcome for test in tests}
    return "reject" if "fail" in outcomes else "hold" if "hold" in outcomes else "release"


class _Scored(NamedTuple):
    """The scores of a cell in a metric, by question, NaN where there is none; each question's cluster; and the
    questions' digest."""

    scores: Scores
    groups: Groups
    questions: str


def _earlier(plan: Plan, evaluation: Evaluation, folder: Path, task: str) -> tuple[_Scored, _Scored]:
    learned, now = evaluation.own_cell(task), evaluation.last_cell(task)
    if learned is None or now is None:
        raise ReportError(
            f"{task} has no answers at the stage at which it was learned, or none after the last one; run "
            "`mslora-cr evaluate CONFIG --stages seen`"
        )
    if learned.questions != now.questions:
        raise ReportError(f"{task} was asked different questions at stages {learned.stage} and {now.stage}")
    metric = plan.metric_of(task)
    return _scored(metric, folder, learned), _scored(metric, folder, now)


def _subgroups(
    plan: Plan, task: str, before: _Scored, after: _Scored, level: float, questions: Callable[[str], TestRecords]
) -> Iterator[GateTest]:
    """Test every group of patients by every attribute that the task's test records have."""
    if not plan.subgroups:
        return
    records = questions(task)
    if records.digest != after.questions:
        raise ReportError(f"the test file of {task} was changed since it was answered; evaluate the run again")
    for attribute, rule in plan.subgroups.items():
        labels = np.array([label or "" for label in banded([one.attributes.get(attribute) for one in records])])
        for value in sorted({*labels.tolist()} - {""}):
            old, new = (
                side._replace(scores=np.where(labels == value, side.scores, np.nan)) for side in (before, after)
            )
            test_level, name = level * plan.share_of_level(rule), f"{task}, {attribute} {value}"
            if np.isnan(new.scores).all():
                continue
            test = _paired(rule.least_patients, "subgroup", name, old, new, rule.margin, test_level)
            few = test.groups < rule.least_patients
            reason = (
                f"{test.groups} independent patients or images; groups of fewer than {rule.least_patients} are counted"
            )
            yield test.model_copy(update={"outcome": "counted", "reason": reason}) if few else test


def _newest(
    plan: Plan, evaluation: Evaluation, folder: Path, results_dir: Path, task: str, level: float
) -> Iterator[GateTest]:
    cell = evaluation.last_cell(task)
    if cell is None:
        raise ReportError(f"{task}, the newest task, is not evaluated; run `mslora-cr evaluate CONFIG --stages seen`")
    level *= plan.share_of_level(plan.tasks.get(task))
    scored = _scored(plan.metric_of(task), folder, cell)
    if plan.new_task.least_score is not None:
        scores, groups = _present(scored.scores, scored.groups)
        required = plan.new_task.least_score / 100
        # The score less a constant: its lower bound exceeds zero where that of the score exceeds what is required.
        comparison = non_inferiority(scores - required, groups, 0.0, level, binary=False)
        yield _test(plan.least_patients, "new task", task, comparison, None, float(scores.mean()), 0.0, level)
    if plan.new_task.better_than_base:
        # Without a bank there is nothing to route: the base's answers are those of task-aware evaluation.
        cells = required_evaluation(results_dir).cells
        base = next((one for one in cells if one.key == (task, 0)), None)
        if base is None or base.questions != cell.questions:
            raise ReportError(f"{task} is not answered by the base model; run `mslora-cr evaluate CONFIG --stages all`")
        before = _scored(plan.metric_of(task), results_dir, base)
        yield _paired(plan.least_patients, "new task", task, before, scored, 0.0, level)


def _probe(plan: Plan, results_dir: Path, name: str, level: float) -> GateTest:
    probe = Probe.read_if_there(results_dir / PROBE / name / f"{PROBE}.json")
    if probe is None:
        raise ReportError(f"the plan names the probe {name}; run `mslora-cr evaluate CONFIG --probe {name}`")
    base, last = (_scored(plan.metric_of(name), results_dir, cell) for cell in (probe.cells[0], probe.cells[-1]))
    return _paired(plan.least_patients, "probe", name, base, last, plan.probes[name], level)


def _paired(
    least: int, what: Tested, name: str, before: _Scored, after: _Scored, margin: float, level: float
) -> GateTest:
    groups = coarsest([before.groups, after.groups])
    values, clusters = _present(after.scores - before.scores, groups)
    scored = [side.scores[~np.isnan(side.scores)] for side in (before, after)]
    comparison = non_inferiority(values, clusters, margin / 100, level, all(map(is_binary, scored)))
    scores = [float(side.mean()) for side in scored]
    return _test(least, what, name, comparison, scores[0], scores[1], 0.0 - margin, level)


def _present(values: Scores, groups: Groups) -> tuple[Scores, Groups]:
    """Return the questions that have a score, and their clusters."""
    there = ~np.isnan(values)
    return values[there], np.unique(groups[there], return_inverse=True)[1]


def _test(
    least: int,
    what: Tested,
    name: str,
    comparison: NonInferiority,
    reference: float | None,
    score: float,
    required: float,
    level: float,
) -> GateTest:
    outcome, reason = _outcome(least, comparison, required, what)
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


def _outcome(least: int, comparison: NonInferiority, required: float, what: str) -> tuple[Outcome, str]:
    """Return the outcome of a test and its reason. The test passes by its lower bound. It fails where the difference is
    at or beyond the requirement, since no number of patients would help. Between the two it is open."""
    limit = f"{required:+.1f} points" if what != "new task" else "what is required"
    if comparison.groups < least:
        return "hold", too_few(comparison.groups, least)
    if 100 * comparison.bound > required:
        return "pass", f"the lower bound {100 * comparison.bound:+.2f} is above {limit}"
    if comparison.needed is None:
        return "fail", f"the difference {100 * comparison.difference:+.2f} is not above {limit}"
    more = max(1, comparison.needed - comparison.groups)
    return "hold", f"the lower bound {100 * comparison.bound:+.2f} is not above {limit}; about {more:,} more would tell"


def _scored(metric: str, folder: Path, cell: Cell) -> _Scored:
    """Return the scores of a cell in a metric."""
    path = (folder / cell.answers).with_name(SCORES)
    table = read_scores(path)
    if cell.scores_sha256 is not None and file_digest(path) != cell.scores_sha256:
        raise ReportError(f"{path} was changed since it was scored; evaluate that run again")
    scores = table.columns.get(metric)
    if scores is None or np.isnan(scores).all():
        there = ", ".join(table.columns)
        raise ReportError(f"{cell.task} has no {metric!r} at stage {cell.stage}; there are {there}")
    return _Scored(scores, table.groups, cell.questions)
