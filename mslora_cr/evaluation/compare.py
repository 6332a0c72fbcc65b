"""Paired tests between runs of the same questions: task by task, and over all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tabulate import tabulate

from mslora_cr.evaluation import intervals
from mslora_cr.evaluation.intervals import flipped_means, flips_for, holm, interval, p_value, resampled_means, span
from mslora_cr.evaluation.results import Cell, Evaluation, ReportError, required_evaluation

COMPARED = {"closed accuracy": "close accuracy", "F1 of open answers": "f1 score", "ROUGE-L": "rouge-l"}
"""Title → name in `metrics.json`."""
OVERALL = "overall"
Stage = Literal["final", "own"]


def compare(runs: Mapping[str, Path], at: Stage = "final") -> dict[str, Any]:
    """Set each run against the first one, question by question.

    Each test is of a task's mean difference, or of the mean over tasks (`OVERALL`); `p` is that of the paired
    approximate randomization test, with enough flips for all tests of a metric; intervals are the bootstrap's, of both
    scores and of their paired difference. `p_adjusted` is Holm's, for all runs and tasks of a metric at once; the
    overall tests of a metric are a family of their own, one test a run.

    Args:
        runs: label → results folder, at least two.
        at: score tasks after the last stage, or each at its own.

    Returns:
        Plain data: how it was computed, the runs, and the tests by metric; scores in percent, differences in points.

    Raises:
        ReportError: a run is not evaluated where it must be, or two runs were asked different questions.
        DataError: the scores of a cell are gone.
    """
    evaluations = {label: required_evaluation(folder) for label, folder in runs.items()}
    baseline, *others = evaluations
    flips = flips_for(sum(task in evaluations[label].tasks for label in others for task in evaluations[baseline].tasks))
    scores = {label: run.scores(runs[label], *COMPARED.values()) for label, run in evaluations.items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for number, title in enumerate(COMPARED):
        answered = _answered(evaluations, {label: columns[number] for label, columns in scores.items()}, at)
        tests = [test for label in others for test in _tests(baseline, label, answered, flips)]
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
        "flips": flips,
        "samples": intervals.SAMPLES,
        "seed": intervals.SEED,
        "confidence": intervals.CONFIDENCE,
        "metrics": found,
    }


class _Answered(NamedTuple):
    """A run's answers to a task: the banks that gave them, their scores, and the means of the scores' resamplings."""

    banks: str
    scores: intervals.Scores
    resampled: intervals.Scores


def _answered(
    evaluations: Mapping[str, Evaluation], scores: Mapping[str, Mapping[tuple[str, int], intervals.Scores]], at: Stage
) -> dict[str, dict[str, _Answered]]:
    """By task and run, for the tasks that the first run has in common with another and that have the metric.

    Args:
        scores: by run what `Evaluation.scores` gives for the metric.
    """
    baseline, first = next(iter(evaluations.items()))
    found = {}
    for number, task in enumerate(first.tasks):
        having = [label for label, run in evaluations.items() if task in run.tasks]
        if len(having) == 1:
            continue
        cells = {label: _cell(label, evaluations[label], task, at) for label in having}
        columns = {label: scores[label].get((task, cell.stage), np.empty(0)) for label, cell in cells.items()}
        for label in having:
            pair = f"{baseline} and {label}"
            if cells[label].questions != cells[baseline].questions:
                raise ReportError(f"{pair} were asked different questions of {task}; evaluate both again")
            counts = len(columns[baseline]), len(columns[label])
            if counts[0] != counts[1]:
                raise ReportError(
                    f"{pair} were asked the same questions of {task}, but scores.csv has {counts[0]} of the one and "
                    f"{counts[1]} of the other; evaluate both again"
                )
        if len(columns[baseline]):
            # All runs see the same draws, so that their differences are paired.
            means = resampled_means(np.column_stack(list(columns.values())), stream=number)
            found[task] = {
                label: _Answered(evaluations[label].bank_numbers(cells[label]), column, draws)
                for (label, column), draws in zip(columns.items(), means.T, strict=True)
            }
    return found


def _tests(
    baseline: str, label: str, answered: Mapping[str, Mapping[str, _Answered]], flips: int
) -> list[dict[str, Any]]:
    """The tests of one run against the baseline in one metric, `OVERALL` last."""
    tests, resampled, flipped = [], [], []
    for number, (task, by_run) in enumerate(answered.items()):
        if label not in by_run:
            continue
        pair = by_run[baseline], by_run[label]
        means = np.array([run.scores.mean() for run in pair])
        resampled.append(np.stack([run.resampled for run in pair]))
        flipped.append(flipped_means(pair[1].scores - pair[0].scores, flips, stream=number))
        banks = {baseline: pair[0].banks, label: pair[1].banks}
        tests.append(_test(label, task, len(pair[0].scores), banks, means, resampled[-1], flipped[-1]))
    if tests:
        means = np.mean([[test["baseline_score"], test["score"]] for test in tests], axis=0) / 100
        questions = sum(test["questions"] for test in tests)
        everything = means, np.mean(resampled, axis=0), np.mean(flipped, axis=0)
        tests.append(_test(label, OVERALL, questions, None, *everything))
    return tests


def _test(
    label: str,
    task: str,
    questions: int,
    banks: dict[str, str] | None,
    means: intervals.Scores,
    resampled: intervals.Scores,
    flipped: intervals.Scores,
) -> dict[str, Any]:
    """One test; `means` (2,) and `resampled` (2, samples) have the baseline first."""
    before, after = (float(mean) for mean in means)
    return {
        "run": label,
        "task": task,
        "questions": questions,
        "banks": banks,
        "baseline_score": 100 * before,
        "baseline_interval": interval(100 * resampled[0]),
        "score": 100 * after,
        "score_interval": interval(100 * resampled[1]),
        "difference": 100 * (after - before),
        "interval": interval(100 * (resampled[1] - resampled[0])),
        "p": p_value(after - before, flipped),
    }


def _cell(label: str, run: Evaluation, task: str, at: Stage) -> Cell:
    cell = run.own_cell(task) if at == "own" else run.last_cell(task)
    if cell is None:
        where, mend = ("at its own stage", "") if at == "own" else ("after the last stage", " --stages seen")
        other = "" if at == "own" else ", or compare with --at own"
        raise ReportError(f"{label}: {task} was not evaluated {where}; run `mslora-cr evaluate CONFIG{mend}`{other}")
    return cell


def render_comparison(found: Mapping[str, Any]) -> str:
    """The tests as text, a table for each metric."""
    parts = []
    baseline = found["baseline"]
    for title, tests in found["metrics"].items():
        rows = []
        for test in tests:
            run = found["runs"][test["run"]]
            banks = f"{run['banks_by']} {test['banks'][test['run']]}" if test["banks"] else run["banks_by"]
            scores = [
                _with_interval(test["baseline_score"], test["baseline_interval"]),
                _with_interval(test["score"], test["score_interval"]),
                _with_interval(test["difference"], test["interval"], "+"),
            ]
            rows.append([test["run"], test["task"], banks, test["questions"], *scores, test["p"], test["p_adjusted"]])
        headers = ["run", "task", "banks by", "questions", baseline, "run's", "difference", "p", "p adjusted"]
        parts.append(f"{title}, %\n" + tabulate(rows, headers=headers, floatfmt=".4f"))
    where = "after the last stage" if found["at"] == "final" else "each task at its own stage"
    answered = found["runs"][baseline]["banks_by"]
    parts.append(
        f"Against {baseline} (banks by {answered}), {where}; in brackets {100 * found['confidence']:g} % intervals "
        f"(bootstrap, {found['samples']} samples, seed {found['seed']}).\np: {found['test']}, {found['flips']} flips. "
        f"Adjusted: {found['correction']}."
    )
    return "\n\n".join(parts)


def _with_interval(value: float, ends: tuple[float, float], sign: str = "") -> str:
    return f"{value:{sign}.2f} [{span(ends)}]"
