"""Paired tests between runs of the same questions: task by task, and over all tasks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tabulate import tabulate

from mslora_cr.analysis.answered import COMPARED, FIGURES, LATER, Answered, Stage, answered_run
from mslora_cr.analysis.class_figures import LOWER_IS_BETTER, NOT_PERCENT
from mslora_cr.evaluation.results import ReportError
from mslora_cr.evaluation.schemas import BetweenTasks, ComparedRun, Comparison, PairedNote, PairedTest
from mslora_cr.metrics.by_class import AT_COVERAGE, CALIBRATION_ERROR, PSEUDO, RISK_COVERAGE
from mslora_cr.metrics.closed import LOWEST
from mslora_cr.metrics.numbers import ERROR
from mslora_cr.statistics import intervals
from mslora_cr.statistics.interval import Interval, bracketed
from mslora_cr.statistics.intervals import (
    Estimate,
    estimate,
    estimate_of,
    percent,
    score_interval,
    t_interval,
    weighted_sum,
)
from mslora_cr.statistics.matrix_intervals import Column, coarsest, is_binary
from mslora_cr.statistics.paired import PairedTask, paired_change, paired_task
from mslora_cr.statistics.significance import flipped_means, flips_for, holm, p_value, sign_test, t_test

OVERALL = "overall"
SPANS = ("baseline_interval", "score_interval", "interval")
UNCOUNTED = {*PSEUDO, *NOT_PERCENT}
"""Figures of which changed questions are not counted as gained and lost."""
UNBOUNDED = {CALIBRATION_ERROR: SPANS, **dict.fromkeys((RISK_COVERAGE, *AT_COVERAGE), SPANS[:2])}
"""The intervals that are not shown of some figures. A calibration error is too large on few questions, the more so the
better a model is calibrated, so the interval of a difference would miss it; its test holds."""


def compare(runs: Mapping[str, Path], at: Stage = "final", titles: Sequence[str] = (*COMPARED, *FIGURES)) -> Comparison:
    """Compare each run with the first one, question by question.

    Each test is of a task's mean difference, or of the mean over tasks (`OVERALL`). `p` comes from the paired
    approximate randomization test, with enough flips for all tests of a metric. Intervals are of both scores and of
    their paired difference. `p_adjusted` is Holm's, over all runs and tasks of a metric; the overall tests of a metric
    are a family of their own, one test per run. All of this concerns other questions of *these tasks*. The overall
    test's `between_tasks` concerns *tasks like these*: it treats the tasks as a sample, and their differences as its
    values.

    Args:
        runs: Results folders, or folders of answer files alone (`TASK/answer-file.jsonl`), by label; at least two.
        at: Score tasks after the last stage, or each at its own; answer files alone are taken as they are.
        titles: The metrics.

    Raises:
        ReportError: A run is not evaluated as needed, or two runs were asked different questions.
        DataError: The scores of a cell are missing, or an answer file is malformed.
    """
    answered = {label: answered_run(label, folder, at) for label, folder in runs.items()}
    baseline, *others = answered
    common = {label: [task for task in answered[baseline].tasks if task in answered[label].tasks] for label in others}
    for label in others:
        for task in common[label]:
            _check_same_questions(task, {name: answered[name] for name in (baseline, label)})
    flips = flips_for(sum(map(len, common.values())))
    metrics = {}
    for title in titles:
        pairs = {label: _pairs(answered[baseline], answered[label], common[label], title) for label in others}
        lowest = LOWEST.get(title, 0.0)
        paired = [label for label in others if pairs[label]]
        scale = (
            max((_largest(pair) for label in paired for pair in pairs[label]), default=1.0) if title == ERROR else 1.0
        )
        tests = [
            _rescaled(test, scale / 100 if title in NOT_PERCENT else 1.0) if title in LOWER_IS_BETTER else test
            for label in paired
            for test in _tests(baseline, label, [_divided(pair, scale) for pair in pairs[label]], flips, lowest)
        ]
        if tests:
            hidden = dict.fromkeys(UNBOUNDED.get(title, ()))
            tests = [test.model_copy(update=hidden) for test in tests]
            metrics[title] = _adjusted_by_family(list(map(_without_counts, tests)) if title in UNCOUNTED else tests)
    if not metrics:
        raise ReportError(f"the runs {', '.join(runs)} have no task in common")
    return Comparison(
        baseline=baseline,
        at=at,
        runs={label: ComparedRun(method=run.method, banks_by=run.banks_by) for label, run in answered.items()},
        test="paired approximate randomization by image or patient, two-sided",
        correction="Holm, over the runs and tasks of a metric; overall tests over the runs",
        flips=flips,
        seed=intervals.SEED,
        confidence=intervals.CONFIDENCE,
        metrics=metrics,
    )


class _Pair(NamedTuple):
    """Both runs' answers to the questions of a task that have the metric; the baseline's first."""

    task: str
    banks: tuple[str | None, str | None]
    scores: tuple[intervals.Scores, intervals.Scores]
    groups: intervals.Groups

    @property
    def difference(self) -> intervals.Scores:
        return self.scores[1] - self.scores[0]


def _check_same_questions(task: str, runs: Mapping[str, Answered]) -> None:
    """Refuse to pair answers to different questions."""
    pair = " and ".join(runs)
    (label, first), (other, second) = runs.items()
    if not first.same_questions(second, task):
        raise ReportError(f"{pair} were asked different questions of {task}; evaluate both again")
    for title, column in first.tasks[task].columns.items():
        counts = len(column.scores), len(second.tasks[task].column(title).scores)
        later = title.partition(":")[0] in LATER
        if counts[0] != counts[1] and not (0 in counts and later):  # an earlier version scored them
            raise ReportError(
                f"{pair} were asked the same questions of {task}, but scores.csv has {counts[0]} of {label} and "
                f"{counts[1]} of {other}; evaluate both again"
            )


def _pairs(baseline: Answered, run: Answered, tasks: Sequence[str], title: str) -> list[_Pair]:
    """Return the tasks that have the metric, with the questions for which both runs have a value; of a metric by class,
    each class of each task."""
    pairs = []
    for task in tasks:
        sides = baseline.tasks[task], run.tasks[task]
        for name in sides[0].columns:
            metric, _, of_class = name.partition(": ")
            columns: list[Column] = [side.column(name) for side in sides]
            if metric == title and all(len(column.scores) for column in columns):
                row, banks = f"{task}: {of_class}" if of_class else task, (sides[0].banks, sides[1].banks)
                scored = ~np.isnan(columns[0].scores + columns[1].scores)
                scores = columns[0].scores[scored], columns[1].scores[scored]
                groups = coarsest([column.groups for column in columns])[scored]
                if len(groups):
                    pairs.append(_Pair(row, banks, scores, np.unique(groups, return_inverse=True)[1]))
    return pairs


def _tests(baseline: str, label: str, pairs: Sequence[_Pair], flips: int, lowest: float) -> list[PairedTest]:
    """Return the tests of one run against the baseline in one metric, whose values start at `lowest`; `OVERALL` comes
    last."""
    tests, flipped = [], []
    parts: list[tuple[Estimate, Estimate, PairedTask]] = []
    for pair in pairs:
        before, after = (estimate(values, pair.groups) for values in pair.scores)
        parts.append((before, after, paired_task(pair.difference, pair.groups, _binary(pair))))
        # All runs use the same signs, whatever tasks they have.
        flipped.append(flipped_means(pair.difference, pair.groups, flips, stream=zlib.crc32(pair.task.encode())))
        banks = dict(zip((baseline, label), pair.banks, strict=True))
        tests.append(_test(label, pair.task, parts[-1:], flipped[-1], banks, lowest))
    overall = _test(label, OVERALL, parts, np.mean(flipped, axis=0), None, lowest)
    between = _between_tasks([test.difference for test in tests])
    return [*tests, overall.model_copy(update={"between_tasks": between})]


def _largest(pair: _Pair) -> float:
    return float(np.max(pair.scores)) or 1.0


def _divided(pair: _Pair, scale: float) -> _Pair:
    return pair._replace(scores=(pair.scores[0] / scale, pair.scores[1] / scale))


def _rescaled(test: PairedTest, factor: float) -> PairedTest:
    """Return a test in the figure's own unit; the run with the lower value wins a task."""

    def ends(interval: Interval | None) -> Interval | None:
        return None if interval is None else (factor * interval[0], factor * interval[1])

    between = test.between_tasks
    if between is not None:
        turned = {"interval": ends(between.interval), "wins": between.losses, "losses": between.wins}
        between = between.model_copy(update=turned)
    names = ("baseline_score", "score", "difference")
    values = {name: factor * getattr(test, name) for name in names}
    return test.model_copy(
        update={**values, **{name: ends(getattr(test, name)) for name in SPANS}, "between_tasks": between}
    )


def _without_counts(test: PairedTest) -> PairedTest:
    """Return a test of pseudo-values, which nearly every question moves: it counts no answers."""
    return test.model_copy(update={"changed": None, "change": None})


def _binary(pair: _Pair) -> bool:
    return all(is_binary(scores) for scores in pair.scores)


def _test(
    label: str,
    task: str,
    parts: Sequence[tuple[Estimate, Estimate, PairedTask]],
    flipped: intervals.Scores,
    banks: dict[str, str | None] | None,
    lowest: float,
) -> PairedTest:
    """Return one test of the mean over tasks, from the estimates of both scores and their difference for each task."""
    weights = [1 / len(parts)] * len(parts)
    before, after = [part[0] for part in parts], [part[1] for part in parts]
    differences = [part[2] for part in parts]
    change = paired_change(differences, weights)
    sums = [weighted_sum(column, weights) for column in (before, after, [task.total for task in differences])]
    return PairedTest(
        run=label,
        task=task,
        questions=sums[2].questions,
        groups=sums[2].groups,
        baseline_score=100 * sums[0].mean,
        baseline_interval=_ends(before, weights, lowest),
        score=100 * sums[1].mean,
        score_interval=_ends(after, weights, lowest),
        difference=100 * (sums[1].mean - sums[0].mean),
        interval=change.ends,
        changed=change.gained + change.lost,
        change=PairedNote.of(change, "differ"),
        p=p_value(sums[2].mean, flipped),
        banks=banks,
    )


def _ends(parts: Sequence[Estimate], weights: Sequence[float], lowest: float) -> Interval:
    """Return the interval of a weighted mean of scores between `lowest` and 1, in percent."""
    width = 1 - lowest
    scaled = [
        part._replace(
            mean=(part.mean - lowest) / width,
            square=(part.square - 2 * lowest * part.mean + lowest**2) / width**2,
            variance=part.variance / width**2,
        )
        for part in parts
    ]
    low, high = score_interval(scaled, weights)
    return percent((lowest + width * low, lowest + width * high))


def _between_tasks(differences: Sequence[float]) -> BetweenTasks:
    ends = t_interval(differences)
    wins, losses = (sum(sign * difference > 1e-9 for difference in differences) for sign in (1, -1))
    return BetweenTasks(
        tasks=len(differences),
        interval=None if ends is None else (max(-100.0, ends[0]), min(100.0, ends[1])),
        p=None if ends is None else t_test(estimate_of(differences)),
        wins=wins,
        losses=losses,
        sign_p=sign_test(wins, losses),
    )


def _adjusted_by_family(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """Return the tests of a metric with adjusted p-values: those of tasks are a family, and so are the overall tests,
    and their results between tasks."""
    single = iter(_adjusted([test for test in tests if test.between_tasks is None]))
    overall = iter(_adjusted([test for test in tests if test.between_tasks is not None]))
    between = iter(_adjusted([test.between_tasks for test in tests if test.between_tasks is not None]))
    return [
        next(single)
        if test.between_tasks is None
        else next(overall).model_copy(update={"between_tasks": next(between)})
        for test in tests
    ]


Tested = TypeVar("Tested", PairedTest, BetweenTasks)


def _adjusted(family: Sequence[Tested]) -> list[Tested]:
    """Return a family of p-values, corrected for their number; None stays None."""
    adjusted = iter(holm([test.p for test in family if test.p is not None]))
    return [test.model_copy(update={"p_adjusted": None if test.p is None else next(adjusted)}) for test in family]


def render_comparison(comparison: Comparison) -> str:
    """Return the tests as text, a table for each metric."""
    parts = []
    baseline = comparison.baseline
    for title, tests in comparison.metrics.items():
        headers = ["run", "task", "banks by", "questions", "images", baseline, "run's", "difference", "p", "p adjusted"]
        rows = [row for test in tests for row in _rows(test, comparison.runs[test.run].banks_by)]
        unit = ", ".join(["%"] * (title not in NOT_PERCENT) + ["lower is better"] * (title in LOWER_IS_BETTER))
        parts.append(
            f"{title}, {unit}\n"
            + tabulate(rows, headers=headers, floatfmt=".4f", missingval="–", disable_numparse=[5, 6, 7])
        )
    where = "after the last stage" if comparison.at == "final" else "each task at its own stage"
    banks_by = comparison.runs[baseline].banks_by
    parts.append(
        f"Against {baseline}{f' (banks by {banks_by})' if banks_by else ''}, {where}; in brackets "
        f"{100 * comparison.confidence:g} % intervals; under a difference how many answers differ, a one-sided bound "
        "of those lost and the exact McNemar test (by image or patient). Images: how many (or patients), where the "
        "data name them.\n"
        f"p: {comparison.test}, {comparison.flips} flips. Adjusted: {comparison.correction}.\n"
        f"{OVERALL}: other questions of these tasks. as a sample: tasks like these; Student's t between tasks, and how "
        "many were won and lost with the sign test's p."
    )
    return "\n\n".join(parts)


def _rows(test: PairedTest, banks_by: str | None) -> list[list[str | float | None]]:
    """Return a line for a task; two for the mean over tasks."""
    banks = test.banks[test.run] if test.banks else None
    scores = [
        _with_interval(test.baseline_score, test.baseline_interval),
        _with_interval(test.score, test.score_interval),
        _with_interval(test.difference, test.interval, "+", test.note),
    ]
    name = " ".join(part for part in (banks_by, banks) if part) or None
    rows = [[test.run, test.task, name, test.questions, test.groups, *scores, test.p, test.p_adjusted]]
    if between := test.between_tasks:
        signs = f"{between.wins} won, {between.losses} lost of {between.tasks}, p {between.sign_p:.4f}"
        ends = _with_interval(test.difference, between.interval, "+")
        rows.append([test.run, "as a sample", *[None] * 4, signs, ends, between.p, between.p_adjusted])
    return rows


def _with_interval(value: float, ends: tuple[float, float] | None, sign: str = "", note: str = "") -> str:
    """Return a number with its interval; notes follow line by line."""
    return "\n".join([f"{value:{sign}.2f}{bracketed(ends)}", *filter(None, note.split("; "))])
