"""How often the intervals cover the truth, and how often the tests reject what is true, by simulation.

    python -m benchmarks.coverage                            # 2,000 trials of each setting
    python -m benchmarks.coverage --trials 200 --json coverage.json
    python -m benchmarks.coverage --only "yes or no"

A stream of 4 or 8 tasks, each asked 80 or 600 questions at every stage. A question is right with the probability of its
task, between 0.6 and 0.9, and at every stage 8 % of the answers are drawn again, so that nothing changes in truth:
backward and forward transfer are zero. In `clustered` settings 8 questions share an image and are right together with
an intra-class correlation of 0.2 (a beta-binomial). `two systems` are as good as each other. `near one` asks 80
questions that 99 % of answers get right. `tasks as a sample` draws the true effects of a second system on five tasks
from N(0, 4 points).

`74 images` shares 600 questions out unequally, the largest image has 103; `one patient` has 841 of 2,000 questions and
100 others share the rest. `tasks of` asks tasks of 40 and 5,000, or of 24, 80 and 600 questions; there the truth is a
loss, or as much gained as lost.

`benchmarks.coverage_classes` has further settings: two and three classes, counts, differences of figures, subgroups.

Of the last task but one hardly an answer changes. The second table has exact sums for one task: how often Tango's
interval covers and how often the one-sided bound of losses does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln, xlogy
from tabulate import tabulate

from mslora_cr.statistics.intervals import (
    Groups,
    Interval,
    Scores,
    estimate,
    estimate_of,
    independent,
    percentile_interval,
    resampled_sums,
    score_interval,
    t_interval,
)
from mslora_cr.statistics.matrix import TaskStageMatrix
from mslora_cr.statistics.matrix_intervals import Column, matrix_intervals
from mslora_cr.statistics.paired import paired_change, paired_task
from mslora_cr.statistics.significance import flip_test, flipped_means, p_value, t_test

TASKS, QUESTIONS = (4, 8), (80, 600)
CLUSTER, CORRELATION = 8, 0.2
REDRAWN = 0.08
FLIPS = 1000
"""Fewer than `compare` takes: a rate of rejections needs no small p."""
LEVEL = 0.05
EXPECTED = (1, 2, 5, 10, 20)
"""Changed answers of a task, on average, in the exact table."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, metavar="N", help="of each setting (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the shares here")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="settings whose name has this text, and no exact sums"
    )
    args = parser.parse_args(argv)
    found = {name: shares(setting, args.trials) for name, setting in settings().items() if args.only in name}
    rows = [[name, what, _figure(share)] for name, by_test in found.items() for what, share in by_test.items()]
    error = (0.95 * 0.05 / args.trials) ** 0.5
    print(tabulate(rows, headers=["setting", "interval covers, or p < 0.05", "share"], disable_numparse=True))
    print(f"\n{args.trials} trials; standard error of a share of 0.95: {error:.4f}\n")
    exact = (
        {}
        if args.only
        else {
            f"{questions} questions, {expected} change, {direction}": exact_shares(questions, *changes)
            for questions in QUESTIONS
            for expected in EXPECTED
            for direction, changes in {
                "both directions alike": (expected / questions / 2, expected / questions / 2),
                "one direction": (0.0, expected / questions),
            }.items()
        }
    )
    if exact:
        lines = [[name, *map(_figure, share)] for name, share in exact.items()]
        headers = ["a task's change, exactly", "interval covers", "bound of losses covers"]
        print(tabulate(lines, headers=headers, disable_numparse=True))
    result = {"trials": args.trials, "shares": found, "exact": {name: [*share] for name, share in exact.items()}}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


Trial = Callable[[np.random.Generator], Mapping[str, bool]]
"""Draws one trial; by what is shown, whether its interval covers the truth or its test (`p of …`) rejects it."""


class ExactShares(NamedTuple):
    """How often the interval of a change and the bound of losses cover."""

    interval: float
    bound: float


def settings() -> dict[str, Trial]:
    """Every setting by name."""
    found: dict[str, Trial] = {}
    for tasks in TASKS:
        for questions in QUESTIONS:
            for more, groups in groups_of(questions).items():
                place = f"{tasks} tasks × {questions}{more}"
                found[place] = _stream(tasks, questions, groups)
                found[f"{place}, last"] = _last_change(tasks, groups)
    for questions in QUESTIONS:
        for more, groups in groups_of(questions).items():
            found[f"two systems, {questions}{more}"] = _two_systems(questions, groups)
    for name, groups in unequal_groups().items():
        for share in (0.3, 0.75, 0.95):
            found[f"{name}, {share:.0%} right"] = _unequal_images(groups, share)
    for sizes in ((40, 5000), (24, 80, 600)):
        for more, cluster in {"": 1, ", clustered": CLUSTER}.items():
            for lost in (0.01, 0.03):
                found[f"tasks of {sizes}, {lost:.0%} lost{more}"] = _unequal_tasks(sizes, 0.0, lost, cluster)
            found[f"tasks of {sizes}, 3 % gained and lost{more}"] = _unequal_tasks(sizes, 0.03, 0.03, cluster)
    found["seven tasks of 80, 5 % gained and lost"] = _unequal_tasks((80,) * 7, 0.05, 0.05, 1)
    from benchmarks.coverage_classes import class_settings  # It draws answers as this module does.

    found |= class_settings()
    others = {"near one": _near_one, "tasks as a sample": _tasks_as_a_sample, "six runs": _runs}
    return found | others


def unequal_groups() -> dict[str, Groups]:
    """74 images of 600 questions, the largest with 103; and a patient with 841 of 2,000, the others with 11 or 12."""
    falling = np.maximum(1, np.round(497 * 1 / np.arange(2, 75) / np.sum(1 / np.arange(2, 75)))).astype(int)
    falling[0] += 497 - falling.sum()
    others = np.full(100, 11) + (np.arange(100) < 59)
    return {
        "74 images, 600 questions": np.repeat(np.arange(74), [103, *falling]),
        "one patient has 841 of 2000": np.repeat(np.arange(101), [841, *others]),
    }


def groups_of(questions: int) -> dict[str, Groups]:
    return {"": independent(questions), ", clustered": np.arange(questions) // CLUSTER}


def shares(trial: Trial, trials: int) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for number in range(trials):
        for what, outcome in trial(np.random.default_rng([7, number])).items():
            found.setdefault(what, []).append(outcome)
    return {what: float(np.mean(outcomes)) for what, outcomes in found.items()}


def exact_shares(questions: int, gained: float, lost: float) -> ExactShares:
    """How often what is shown of a task's change covers, where each question is gained or lost with these
    probabilities: the sum over all that can happen."""
    expected = questions * (gained + lost)
    most = min(questions, int(expected + 8 * expected**0.5 + 12))  # more happen less than once in 10 ** 9
    covered = bounded = 0.0
    for plus in range(most + 1 if gained else 1):
        for minus in range(most - plus + 1 if lost else 1):
            rest = questions - plus - minus
            ways = gammaln(questions + 1) - gammaln([plus + 1, minus + 1, rest + 1]).sum()
            chance = np.exp(ways + xlogy([plus, minus, rest], [gained, lost, 1 - gained - lost]).sum())
            values = np.repeat([1.0, -1.0, 0.0], [plus, minus, rest])
            change = paired_change([paired_task(values, independent(questions), True)])
            covered += chance * covers(change.ends, 100 * (gained - lost))
            bounded += chance * (change.most_lost >= 100 * lost)
    return ExactShares(float(covered), float(bounded))


def _figure(share: float) -> str:
    return f"{share:.3f}"


def covers(ends: Interval | None, truth: float) -> bool:
    return ends is not None and ends[0] - 1e-9 <= truth <= ends[1] + 1e-9


def answers(generator: np.random.Generator, groups: Groups, share: float) -> Scores:
    """Right (1) and wrong (0) answers, correlated within clusters where questions share them."""
    if len(np.unique(groups)) == len(groups):
        probability = np.full(len(groups), share)
    else:
        size = (1 - CORRELATION) / CORRELATION
        probability = generator.beta(share * size, (1 - share) * size, size=int(groups.max()) + 1)[groups]
    return (generator.random(len(groups)) < probability).astype(np.float64)


def _stream(tasks: int, questions: int, groups: Groups) -> Trial:
    names = tuple(f"task {number}" for number in range(tasks))

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        shares = dict(zip(names, _shares_right(tasks), strict=True))
        columns: dict[tuple[str, int], Column] = {}
        for task in names:
            scores = answers(generator, groups, shares[task])
            for stage in range(tasks + 1):
                columns[task, stage] = Column(scores, groups)
                scores = _redrawn(generator, groups, shares[task], scores)
        matrix = TaskStageMatrix(names, names, {cell: 100 * column.scores.mean() for cell, column in columns.items()})
        found = matrix_intervals(matrix, columns, {cell: str(cell) for cell in columns})
        truth = TaskStageMatrix(names, names, {cell: 100 * shares[cell[0]] for cell in columns})
        expected = truth.summary()
        one = columns[names[-1], 0]  # drawn once: what is drawn again has less in common with its image
        return {
            "a task's score": covers(score_interval([estimate(*one)]), shares[names[-1]]),
            **{
                figure: covers(interval.ends, float(expected[figure] or 0))
                for figure, interval in found.figures.items()
            },
            "a task's change": covers(found.transfer[names[0]].ends, 0),
            "average of stage 2": covers(found.stages[2], truth.stage_average(2)),
        }

    return trial


def _last_change(tasks: int, groups: Groups) -> Trial:
    """The change of the last task but one, of which only one stage draws answers again."""
    share = _shares_right(tasks)[-2]

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        before = answers(generator, groups, share)
        change = _redrawn(generator, groups, share, before) - before
        return {"change of the last task but one": covers(_change_of([change], [groups]), 0)}

    return trial


def _change_of(differences: Sequence[Scores], groups: Sequence[Groups], binary: bool = True) -> Interval:
    """The interval of the mean over tasks."""
    tasks = [paired_task(values, clusters, binary) for values, clusters in zip(differences, groups, strict=True)]
    return paired_change(tasks, [1 / len(tasks)] * len(tasks)).ends


def _unequal_images(groups: Groups, share: float) -> Trial:
    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        one, other = answers(generator, groups, share), answers(generator, groups, share)
        counts = np.column_stack([one, np.ones(len(one))])
        replicates = resampled_sums(counts, groups)
        known = estimate(one, groups)
        ends = percentile_interval(replicates[:, 0] / replicates[:, 1], known.freedom + 1)
        return {
            "a score": covers(score_interval([known]), share),
            "difference of two systems": covers(_change_of([one - other], [groups]), 0),
            "bootstrap, as of BLEU": covers(ends, share),
        }

    return trial


def _unequal_tasks(sizes: Sequence[int], gained: float, lost: float, cluster: int) -> Trial:
    """Every question is gained or lost with these probabilities; those of an image together more often."""

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        groups = [np.arange(size) // cluster for size in sizes]
        down = [answers(generator, clusters, lost) for clusters in groups]
        up = [answers(generator, clusters, gained) if gained else np.zeros(len(clusters)) for clusters in groups]
        differences = [plus - minus for plus, minus in zip(up, down, strict=True)]
        return {"mean change": covers(_change_of(differences, groups), 100 * (gained - lost))}

    return trial


def _shares_right(tasks: int) -> list[float]:
    return [float(share) for share in np.linspace(0.6, 0.9, tasks)]


def _redrawn(generator: np.random.Generator, groups: Groups, share: float, scores: Scores) -> Scores:
    return np.where(generator.random(len(scores)) < REDRAWN, answers(generator, groups, share), scores)


def _two_systems(questions: int, groups: Groups) -> Trial:
    """Two systems that are as good as each other, on one task and on four; and scores between 0 and 1, as F1."""

    def trial(generator: np.random.Generator) -> Mapping[str, bool]:
        one = answers(generator, groups, 0.75) - answers(generator, groups, 0.75)
        tasks = [answers(generator, groups, 0.75) - answers(generator, groups, 0.75) for _ in range(4)]
        flipped = [flipped_means(task, groups, FLIPS, number) for number, task in enumerate(tasks)]
        overall = float(np.mean([task.mean() for task in tasks]))
        parts_of_words, others = (
            np.where(answers(generator, groups, 0.4) == 1, 1.0, generator.beta(1, 3, size=questions)) for _ in range(2)
        )
        clusters, mean = int(groups.max()) + 1, 0.4 + 0.6 * 0.25
        ratio = resampled_sums(np.column_stack([parts_of_words, np.ones(questions)]), groups)
        return {
            "difference": covers(_change_of([one], [groups]), 0),
            "difference over four tasks": covers(_change_of(tasks, [groups] * 4), 0),
            "difference of F1": covers(_change_of([parts_of_words - others], [groups], False), 0),
            "mean F1": covers(score_interval([estimate(parts_of_words, groups)]), mean),
            "bootstrap, as of BLEU": covers(percentile_interval(ratio[:, 0] / ratio[:, 1], clusters), mean),
            "p of the difference": p_value(float(one.mean()), flipped_means(one, groups, FLIPS)) < LEVEL,
            "p over four tasks": p_value(overall, np.mean(flipped, axis=0)) < LEVEL,
        }

    return trial


def _near_one(generator: np.random.Generator) -> Mapping[str, bool]:
    groups = independent(80)
    shares = (0.99, 0.99, 0.97, 0.99)
    tasks = [estimate((generator.random(80) < share).astype(np.float64), groups) for share in shares]
    return {
        "a task's score": covers(score_interval(tasks[:1]), 0.99),
        "average of four tasks": covers(score_interval(tasks, [0.25] * 4), float(np.mean(shares))),
    }


def _tasks_as_a_sample(generator: np.random.Generator) -> Mapping[str, bool]:
    groups, tasks = independent(600), []
    for effect in generator.normal(0, 0.04, size=5):
        first, second = answers(generator, groups, 0.75), answers(generator, groups, min(0.75 + effect, 1.0))
        tasks.append(second - first)
    differences = [100 * float(task.mean()) for task in tasks]
    flipped = np.mean([flipped_means(task, groups, FLIPS, number) for number, task in enumerate(tasks)], axis=0)
    return {
        "difference between tasks": covers(t_interval(differences), 0),
        "p between tasks": t_test(estimate_of(differences)) < LEVEL,
        "p of these tasks (not its question)": p_value(np.mean(differences) / 100, flipped) < LEVEL,
    }


def _runs(generator: np.random.Generator) -> Mapping[str, bool]:
    """Paired differences of two methods over two orders × three seeds, none in truth."""
    differences = generator.normal(0, 3, size=6).tolist()
    return {
        "difference of runs": covers(t_interval(differences), 0),
        "p of runs": flip_test(differences) < LEVEL,
    }


if __name__ == "__main__":
    main()
