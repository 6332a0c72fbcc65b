"""What must stay small after an update: calibration errors, and the share of questions that are taken for foreign.

Each is measured with a one-sided upper bound that respects images and patients, and passes where the bound is below the
plan's limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy

from mslora_cr.clinical.asked import right_of
from mslora_cr.data.records import TestRecords
from mslora_cr.evaluation.results import Cell, Evaluation, ReportError, required_evaluation
from mslora_cr.evaluation.schemas import ROUTING, Routing
from mslora_cr.evaluation.score import SCORES, asked_in, read_scores
from mslora_cr.metrics.calibration import expected_calibration_error
from mslora_cr.release.gate_test import GateTest, Outcome, Tested, too_few
from mslora_cr.release.plan import Plan
from mslora_cr.statistics.intervals import SAMPLES, SEED, Groups, Scores
from mslora_cr.statistics.noninferiority import POWER, sample_size


def calibration_tests(
    plan: Plan, evaluation: Evaluation, folder: Path, level: float, questions: Callable[[str], TestRecords]
) -> Iterator[GateTest]:
    """Test the expected calibration error of every task's closed questions after the last stage.

    Its standard error is that of the bootstrap over patients. The error of few questions is too large on average, so
    the test errs on the safe side.

    Raises:
        ReportError: No task has probabilities, or a task's test file was changed since it was answered.
    """
    assert plan.calibration is not None
    cells = [cell for task in evaluation.tasks if (cell := evaluation.last_cell(task)) is not None]
    tests = [test for cell in cells if (test := _calibration_test(plan, folder, cell, level, questions(cell.task)))]
    if not tests:
        raise ReportError("no closed question has probabilities; evaluate with evaluation.probabilities=true")
    yield from tests


def _calibration_test(plan: Plan, folder: Path, cell: Cell, level: float, records: TestRecords) -> GateTest | None:
    """Return a task's test; None where it has no closed question with probabilities."""
    assert plan.calibration is not None
    if records.digest != cell.questions:
        raise ReportError(f"the test file of {cell.task} was changed since it was answered; evaluate the run again")
    path = folder / cell.answers
    asked = asked_in(path, list(records))
    chosen = [index for index, one in enumerate(asked) if one.closed and one.kind == "choice" and one.probabilities]
    if not chosen:
        return None
    scored = [(asked[index], asked[index].probabilities or {}) for index in chosen]
    confidence = np.array([max(chances.values()) for _, chances in scored])
    right = right_of(
        [one for one, _ in scored], [max(chances, key=lambda text: chances[text]) for _, chances in scored]
    )
    groups = np.unique(read_scores(path.with_name(SCORES)).groups[chosen], return_inverse=True)[1]
    count = int(groups.max()) + 1
    error = expected_calibration_error(confidence, right)
    spread = float(np.std(_resampled_errors(confidence, right, groups)))
    limit = plan.calibration.greatest_error / 100
    return _limited(
        plan,
        "calibration",
        cell.task,
        limit,
        error,
        upper=error + float(scipy.special.stdtrit(max(count - 1, 1), 1 - level)) * spread,
        p=float(scipy.special.stdtr(max(count - 1, 1), (error - limit) / spread)) if spread else float(error >= limit),
        variance=spread**2 * count,
        counts=(len(chosen), count),
        level=level,
    )


def _resampled_errors(confidence: Scores, right: Scores, groups: Groups) -> Scores:
    """Return the calibration error of questions of patients drawn with replacement, (resamplings,)."""
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    generator = np.random.default_rng(SEED)
    errors = np.empty(SAMPLES)
    for number in range(SAMPLES):
        drawn = np.concatenate([members[group] for group in generator.integers(len(members), size=len(members))])
        errors[number] = expected_calibration_error(confidence[drawn], right[drawn])
    return errors


def foreign_tests(plan: Plan, folder: Path, level: float) -> Iterator[GateTest]:
    """Test the share of each learned task's questions that are flagged as like none of the tasks.

    The bound is Clopper and Pearson's, with the number of patients or images in place of that of questions. Source:
    Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial", Biometrika
    1934.

    Args:
        plan: What must be shown.
        folder: The results folder of routed answers.
        level: The one-sided level of each test.

    Raises:
        ReportError: The run has no routed answers, or its router says of no question that it is foreign.
    """
    assert plan.foreign is not None
    routing = Routing.read_if_there(folder / ROUTING)
    if routing is None:
        raise ReportError(f"there is no {folder / ROUTING}; run `mslora-cr evaluate CONFIG --banks-by routed`")
    last = routing.stages[-1]
    if last.foreign is None:
        raise ReportError("the router cannot tell foreign questions; run `mslora-cr bank fit-router CONFIG`")
    evaluation, limit = required_evaluation(folder), plan.foreign.greatest_share / 100
    for task in last.learned:
        cell = evaluation.last_cell(task)
        if cell is None:
            raise ReportError(f"{task} is not routed after the last stage; run `mslora-cr evaluate` --banks-by routed")
        groups = read_scores((folder / cell.answers).with_name(SCORES)).groups
        questions, count = len(groups), len(np.unique(groups))
        share = last.foreign[task] / questions
        wrong = share * count
        yield _limited(
            plan,
            "foreign questions",
            task,
            limit,
            share,
            upper=1.0 if share >= 1 else float(scipy.special.betaincinv(wrong + 1, count - wrong, 1 - level)),
            p=1.0 if share >= 1 else 1 - float(scipy.special.betainc(wrong + 1, count - wrong, limit)),
            variance=share * (1 - share),
            counts=(questions, count),
            level=level,
        )


def _limited(
    plan: Plan,
    what: Tested,
    name: str,
    limit: float,
    value: float,
    upper: float,
    p: float,
    variance: float,
    counts: tuple[int, int],
    level: float,
) -> GateTest:
    """Return a test of a value that must be below a limit.

    Args:
        plan: What must be shown.
        what: What is tested.
        limit: A share.
        value: The measured share.
        upper: Its one-sided upper bound at the level of the test.
        p: The p-value.
        variance: The variance that one patient contributes.
        counts: The number of questions and of patients or images.
        level: The level of the test.
    """
    groups = counts[1]
    outcome: Outcome
    distance, needed = limit - value, None
    if distance > 0:
        needed = sample_size(max(variance, limit * (1 - limit) / 4), distance, level, POWER)
    if groups < plan.least_patients:
        outcome, reason = "hold", too_few(groups, plan.least_patients)
    elif upper < limit:
        outcome, reason = "pass", f"the upper bound {100 * upper:.2f} % is below {100 * limit:g} %"
    elif needed is None:
        outcome, reason = "fail", f"{100 * value:.2f} % is not below {100 * limit:g} %"
    else:
        more = max(1, needed - groups)
        bound = f"the upper bound {100 * min(upper, 1.0):.2f} % is not below {100 * limit:g} %"
        outcome, reason = "hold", f"{bound}; about {more:,} more would tell"
    return GateTest(
        what=what,
        name=name,
        outcome=outcome,
        reason=reason,
        required=0.0,
        reference=None,
        score=100 * value,
        difference=100 * distance,
        bound=100 * (limit - upper),
        level=level,
        p=p,
        questions=counts[0],
        groups=groups,
        gained=0,
        lost=0,
        needed=needed,
    )
