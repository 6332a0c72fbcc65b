"""Paired tests between runs of the same questions: task by task, and over all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tabulate import tabulate

from mslora_cr.evaluation import intervals
from mslora_cr.evaluation.heatmaps import span
from mslora_cr.evaluation.intervals import holm, interval, randomization_test, resampled_means
from mslora_cr.evaluation.record import Cell, Evaluation, ReportError, read_evaluation

COMPARED = {"closed accuracy": "close accuracy", "F1 of open answers": "f1 score", "ROUGE-L": "rouge-l"}
"""Title → name in `metrics.json`."""
OVERALL = "overall"
Stage = Literal["final", "own"]


def compare(runs: Mapping[str, Path], at: Stage = "final") -> dict[str, Any]:
    """Set each run against the first one, question by question.

    Each test is of a task's mean difference, or of the mean over tasks (`OVERALL`); `p` is that of the paired
    approximate randomization test, `interval` the paired bootstrap's of the difference. `p_adjusted` is Holm's, for all
    runs and tasks of a metric at once; the overall tests of a metric are a family of their own, one test a run.

    Args:
        runs: label → results folder, at least two.
        at: score tasks after the last stage, or each at its own.

    Returns:
        Plain data: how it was computed, the runs, and the tests by metric; scores in percent, differences in points.

    Raises:
        ReportError: a run is not evaluated where it must be, or two runs were asked different questions.
        DataError: the scores of a cell are gone.
    """
    baseline, *others = evaluations = {label: _evaluated(folder) for label, folder in runs.items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for title, metric in COMPARED.items():
        scores = {label: run.scores(runs[label], metric) for label, run in evaluations.items()}
        tests = []
        for label in others:
            pair = (evaluations[baseline], scores[baseline]), (evaluations[label], scores[label])
            tests += _tests(baseline, label, pair, at)
        for family in ([test for test in tests if (test["task"] == OVERALL) is overall] for overall in (False, True)):
            for test, adjusted in zip(family, holm([test["p"] for test in family]), strict=True):
                test["p_adjusted"] = adjusted
        if tests:
            found[title] = tests
    if not found:
        raise ReportError(f"the runs {', '.join(runs)} have no task in common")
    return {
        "baseline": baseline,
        "at": at,
        "runs": {label: {"method": run.method, "banks_by": run.banks_by} for label, run in evaluations.items()},
        "test": "paired approximate randomization, two-sided",
        "correction": "Holm, over the runs and tasks of a metric; overall tests over the runs",
        "samples": intervals.SAMPLES,
        "seed": intervals.SEED,
        "confidence": intervals.CONFIDENCE,
        "metrics": found,
    }


Scored = tuple[Evaluation, dict[tuple[str, int], intervals.Scores]]


def _tests(baseline: str, label: str, pair: tuple[Scored, Scored], at: Stage) -> list[dict[str, Any]]:
    """The tests of one run against the baseline in one metric, `OVERALL` last."""
    (first, first_scores), (second, second_scores) = pair
    tests, differences, drawn = [], [], []
    for number, task in enumerate(task for task in first.tasks if task in second.tasks):
        theirs, ours = _cell(baseline, first, task, at), _cell(label, second, task, at)
        if theirs.questions != ours.questions:
            raise ReportError(f"{baseline} and {label} were asked different questions of {task}; evaluate both anew")
        if (task, theirs.stage) not in first_scores:
            continue
        before, after = first_scores[task, theirs.stage], second_scores[task, ours.stage]
        difference = after - before
        draws = resampled_means(difference[:, None], stream=number)[:, 0]
        differences.append(difference)
        drawn.append(draws)
        banks = {baseline: first.bank_numbers(theirs), label: second.bank_numbers(ours)}
        tests.append(_test(label, task, len(difference), banks, (before.mean(), after.mean()), draws, [difference]))
    if tests:
        means = [float(np.mean([test[side] for test in tests])) / 100 for side in ("baseline_score", "score")]
        questions = sum(test["questions"] for test in tests)
        draws = np.mean(drawn, axis=0)
        tests.append(_test(label, OVERALL, questions, None, (means[0], means[1]), draws, differences))
    return tests


def _test(
    label: str,
    task: str,
    questions: int,
    banks: dict[str, str] | None,
    means: tuple[float, float],
    draws: intervals.Scores,
    differences: Sequence[intervals.Scores],
) -> dict[str, Any]:
    return {
        "run": label,
        "task": task,
        "questions": questions,
        "banks": banks,
        "baseline_score": 100 * float(means[0]),
        "score": 100 * float(means[1]),
        "difference": 100 * float(means[1] - means[0]),
        "interval": interval(100 * draws),
        "p": randomization_test(differences),
    }


def _cell(label: str, run: Evaluation, task: str, at: Stage) -> Cell:
    cell = run.own_cell(task) if at == "own" else run.last_cell(task)
    if cell is None:
        where, mend = ("at its own stage", "") if at == "own" else ("after the last stage", " --stages seen")
        other = "" if at == "own" else ", or compare with --at own"
        raise ReportError(f"{label}: {task} was not evaluated {where}; run `mslora-cr evaluate CONFIG{mend}`{other}")
    return cell


def _evaluated(folder: Path) -> Evaluation:
    evaluation = read_evaluation(folder)
    if evaluation is None:
        raise ReportError(f"there is no {folder / 'evaluation.json'}; evaluate that run first")
    return evaluation


def render_comparison(found: Mapping[str, Any]) -> str:
    """The tests as text, a table for each metric."""
    parts = []
    baseline = found["baseline"]
    for title, tests in found["metrics"].items():
        rows = []
        for test in tests:
            run = found["runs"][test["run"]]
            banks = f"{run['banks_by']} {test['banks'][test['run']]}" if test["banks"] else run["banks_by"]
            numbers = (test["questions"], test["baseline_score"], test["score"], test["difference"])
            rows.append(
                [test["run"], test["task"], banks, *numbers, span(test["interval"]), test["p"], test["p_adjusted"]]
            )
        headers = ["run", "task", "banks by", "questions", baseline, "run's", "difference"]
        headers += [f"{100 * found['confidence']:g} % interval", "p", "p adjusted"]
        formats = ("", "", "", "d", ".2f", ".2f", "+.2f", "", ".4f", ".4f")
        parts.append(f"{title}, %\n" + tabulate(rows, headers=headers, floatfmt=formats))
    where = "after the last stage" if found["at"] == "final" else "each task at its own stage"
    answered = found["runs"][baseline]["banks_by"]
    parts.append(
        f"Against {baseline} (banks by {answered}), {where}. p: {found['test']}; intervals: paired bootstrap; "
        f"{found['samples']} samples, seed {found['seed']}.\nAdjusted: {found['correction']}."
    )
    return "\n\n".join(parts)
