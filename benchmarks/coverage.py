"""How often the intervals cover the truth, and how often the tests reject what is true, by simulation.

    python -m benchmarks.coverage                            # 2,000 trials of each setting
    python -m benchmarks.coverage --trials 200 --json coverage.json

A stream of 4 or 8 tasks, each asked 80 or 600 questions at every stage from its own on. A question is right with the
probability of its task, between 0.6 and 0.9, and at every stage 8 % of the answers are drawn again, so that nothing
changes in truth: forgetting and backward transfer are zero. (Of the last task but one hardly an answer changes: too few
for any interval to miss zero in one of twenty trials.) In `clustered` settings 8 questions share an image and are
right together with an intra-class correlation of 0.2 (a beta-binomial). `two systems` are as good as each other. `near
one` asks 80 questions that 99 % of answers get right. `tasks as a sample` draws the true effects of a second system on
five tasks from N(0, 4 points).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from mslora_cr.evaluation.figures import Column, matrix_intervals
from mslora_cr.evaluation.intervals import (
    Groups,
    Interval,
    Scores,
    difference_interval,
    estimate,
    estimate_of,
    independent,
    percentile_interval,
    resampled_sums,
    score_interval,
    t_interval,
    weighted_sum,
)
from mslora_cr.evaluation.matrix import TaskStageMatrix
from mslora_cr.evaluation.significance import flip_test, flipped_means, p_value, t_test

TASKS, QUESTIONS = (4, 8), (80, 600)
CLUSTER, CORRELATION = 8, 0.2
REDRAWN = 0.08
FLIPS = 1000
"""Fewer than `compare` takes: a rate of rejections needs no small p."""
LEVEL = 0.05

Found = Mapping[str, list[bool]]
"""By what is shown, in each trial whether its interval covers the truth, or its test rejects it (`p of …`)."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, metavar="N", help="of each setting (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the shares here")
    args = parser.parse_args(argv)
    found = {name: shares(trial, args.trials) for name, trial in settings().items()}
    rows = [[name, what, f"{share:.3f}"] for name, own in found.items() for what, share in own.items()]
    error = (0.95 * 0.05 / args.trials) ** 0.5
    print(tabulate(rows, headers=["setting", "interval covers, or p < 0.05", "share"], disable_numparse=True))
    print(f"\n{args.trials} trials; standard error of a share of 0.95: {error:.4f}")
    result = {"trials": args.trials, "shares": found}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


Trial = Callable[[np.random.Generator], Mapping[str, bool]]


def settings() -> dict[str, Trial]:
    """Every setting by name: a function that draws one trial and says what it covers or rejects."""
    found: dict[str, Trial] = {}
    for tasks in TASKS:
        for questions in QUESTIONS:
            place = f"{tasks} tasks × {questions}"
            found[place] = _stream(tasks, questions, independent(questions))
            found[f"{place}, clustered"] = _stream(tasks, questions, np.arange(questions) // CLUSTER)
    for questions in QUESTIONS:
        found[f"two systems, {questions}"] = _two_systems(questions, independent(questions))
        found[f"two systems, {questions}, clustered"] = _two_systems(questions, np.arange(questions) // CLUSTER)
    return found | {"near one": _near_one, "tasks as a sample": _tasks_as_a_sample, "six runs": _runs}


def shares(trial: Trial, trials: int) -> dict[str, float]:
    found = [trial(np.random.default_rng([7, number])) for number in range(trials)]
    return {what: float(np.mean([row[what] for row in found])) for what in found[0]}


def _covers(ends: Interval | None, truth: float) -> bool:
    assert ends is not None
    return ends[0] - 1e-9 <= truth <= ends[1] + 1e-9


def answers(generator: np.random.Generator, groups: Groups, share: float) -> Scores:
    """Right (1) and wrong (0) answers, correlated within clusters where questions share them."""
    if len(np.unique(groups)) == len(groups):
        own = np.full(len(groups), share)
    else:
        size = (1 - CORRELATION) / CORRELATION
        own = generator.beta(share * size, (1 - share) * size, size=int(groups.max()) + 1)[groups]
    return (generator.random(len(groups)) < own).astype(np.float64)


def _stream(tasks: int, questions: int, groups: Groups) -> Trial:
    names = tuple(f"task {number}" for number in range(tasks))

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        shares = dict(zip(names, np.linspace(0.6, 0.9, tasks), strict=True))
        columns: dict[tuple[str, int], Column] = {}
        for number, task in enumerate(names, 1):
            scores = answers(generator, groups, shares[task])
            for stage in range(number, tasks + 1):
                redrawn = generator.random(questions) < REDRAWN
                scores = np.where(redrawn, answers(generator, groups, shares[task]), scores)
                columns[task, stage] = Column(scores, groups)
        matrix = TaskStageMatrix(names, names, {cell: 100 * column.scores.mean() for cell, column in columns.items()})
        found = matrix_intervals(matrix, columns, {cell: str(cell) for cell in columns})
        truth = TaskStageMatrix(names, names, {cell: 100 * shares[cell[0]] for cell in columns})
        expected = truth.summary()
        one = columns[names[-1], tasks]
        return {
            "a task's score": _covers(score_interval([estimate(*one)]), shares[names[-1]]),
            **{figure: _covers(ends, float(expected[figure] or 0)) for figure, ends in found.figures.items()},
            "a task's change": _covers(found.transfer[names[0]], 0),
            "change of the last task but one": _covers(found.transfer[names[-2]], 0),
            "average of stage 2": _covers(found.stages[2], truth.stage_average(2)),
        }

    return trial


def _two_systems(questions: int, groups: Groups) -> Trial:
    """Two systems that are as good as each other, on one task and on four; and scores between 0 and 1, as F1."""

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        one = answers(generator, groups, 0.75) - answers(generator, groups, 0.75)
        tasks = [answers(generator, groups, 0.75) - answers(generator, groups, 0.75) for _ in range(4)]
        flipped = [flipped_means(task, groups, FLIPS, number) for number, task in enumerate(tasks)]
        parts = [estimate(task, groups) for task in tasks]
        overall = weighted_sum(parts, [0.25] * 4)
        parts_of_words = np.where(answers(generator, groups, 0.4) == 1, 1.0, generator.beta(1, 3, size=questions))
        clusters, mean = int(groups.max()) + 1, 0.4 + 0.6 * 0.25
        ratio = resampled_sums(np.column_stack([parts_of_words, np.ones(questions)]), groups)
        return {
            "difference": _covers(difference_interval(estimate(one, groups), True), 0),
            "difference over four tasks": _covers(difference_interval(overall, True), 0),
            "mean F1": _covers(score_interval([estimate(parts_of_words, groups)]), mean),
            "bootstrap, as of BLEU": _covers(percentile_interval(ratio[:, 0] / ratio[:, 1], clusters), mean),
            "p of the difference": p_value(float(one.mean()), flipped_means(one, groups, FLIPS)) < LEVEL,
            "p over four tasks": p_value(overall.mean, np.mean(flipped, axis=0)) < LEVEL,
        }

    return trial


def _near_one(generator: np.random.Generator) -> Mapping[str, bool]:
    groups = independent(80)
    shares = (0.99, 0.99, 0.97, 0.99)
    tasks = [estimate((generator.random(80) < share).astype(np.float64), groups) for share in shares]
    return {
        "a task's score": _covers(score_interval(tasks[:1]), 0.99),
        "average of four tasks": _covers(score_interval(tasks, [0.25] * 4), float(np.mean(shares))),
    }


def _tasks_as_a_sample(generator: np.random.Generator) -> Mapping[str, bool]:
    groups, tasks = independent(600), []
    for effect in generator.normal(0, 0.04, size=5):
        first, second = answers(generator, groups, 0.75), answers(generator, groups, min(0.75 + effect, 1.0))
        tasks.append(second - first)
    differences = [100 * float(task.mean()) for task in tasks]
    flipped = np.mean([flipped_means(task, groups, FLIPS, number) for number, task in enumerate(tasks)], axis=0)
    return {
        "difference between tasks": _covers(t_interval(differences), 0),
        "p between tasks": t_test(estimate_of(differences)) < LEVEL,
        "p of these tasks (not its question)": p_value(np.mean(differences) / 100, flipped) < LEVEL,
    }


def _runs(generator: np.random.Generator) -> Mapping[str, bool]:
    """Paired differences of two methods over two orders × three seeds, none in truth."""
    differences = generator.normal(0, 3, size=6).tolist()
    return {
        "difference of runs": _covers(t_interval(differences), 0),
        "p of runs": flip_test(differences) < LEVEL,
    }


if __name__ == "__main__":
    main()
