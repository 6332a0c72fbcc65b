"""What the small base of the open stream can do alone, and how far its tasks can be told apart without any bank.

    python -m benchmarks.open_base open_small

For each kind of closed question, a linear probe (logistic regression on the frozen tower's mean feature, scikit-learn)
against the most frequent training answer; and the router's accuracy over all tasks, by picture and question, by picture
alone, and by question alone. Each task is then held out in turn, and its questions should be like none of the others.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tabulate import tabulate
from torch import Tensor

from mslora_cr.config.load import load_config
from mslora_cr.config.schema import Task
from mslora_cr.data.tasks import task_image_roots, test_records, training_records
from mslora_cr.models.load import load_base
from mslora_cr.routing.fit import feature_extractor, router_statistics
from mslora_cr.routing.foreign import part_columns
from mslora_cr.routing.foreign_questions import ForeignQuestions
from mslora_cr.routing.lda import Router, TaskStatistics

FEWEST = 20
"""The fewest test questions of a kind that are probed."""


Rows = list[dict[str, Any]]
"""A table, by column."""


class Side(NamedTuple):
    """A task's questions of one side: (questions, features) of the router, the texts, and the true answers."""

    features: Tensor
    texts: list[str]
    answers: list[str]


class Kind(NamedTuple):
    """Questions that a probe answers: their task, kind, and the side's rows."""

    task: str
    kind: str
    training: list[int]
    test: list[int]


def main(argv: Sequence[str] | None = None) -> dict[str, Rows]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.open_base", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", default="open_small", help="configuration (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    base = load_base(config, "cpu")
    extractor = feature_extractor(config, base)
    sides: dict[str, tuple[Side, Side]] = {}
    statistics: list[TaskStatistics] = []
    kinds: list[Kind] = []
    for task in config.stream:
        roots, training, test = (
            task_image_roots(config, task),
            training_records(config, task),
            test_records(config, task),
        )
        parts = [
            torch.cat(list(extractor.batches(records, range(len(records)), roots, task.name)))
            for records in (training, test)
        ]
        texts = [record.turns[0].text.replace("<image>", "").strip() for record in training]
        asked = [record.question for record in test]
        sides[task.name] = (
            Side(parts[0], texts, [record.turns[1].text for record in training]),
            Side(parts[1], asked, [record.gt for record in test]),
        )
        kinds += kinds_of(task.name, texts, asked, [_kind(record) for record in test])
        statistics.append(router_statistics(config, task, training, base))
    pictures = extractor.image_features
    questions = {name: test.features for name, (_, test) in sides.items()}
    foreign = ForeignQuestions(statistics, pictures, lambda task: questions[task.name])
    tables = {
        "probes": [row for kind in kinds if (row := probe(kind, *sides[kind.task], pictures))],
        "routing": routing(statistics, questions, pictures),
        "held out": held_out(foreign, config.stream),
    }
    for rows in tables.values():
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"), end="\n\n")
    return tables


def _kind(record: Any) -> str | None:
    """The kind of a closed question; None of an open one."""
    about = record.attributes
    cell = f", {about['cell']}" if "cell" in about else ""
    return f"{about.get('question', '')}{cell}" if record.answer_type == "CLOSED" else None


def kinds_of(task: str, texts: Sequence[str], asked: Sequence[str], kinds: Sequence[str | None]) -> list[Kind]:
    """Group a task's questions by kind. Training records do not name their kind: the test questions' texts tell it."""
    of_text = {text: kind for text, kind in zip(asked, kinds, strict=True) if kind}
    return [
        Kind(
            task,
            name,
            [row for row, text in enumerate(texts) if of_text.get(text) == name],
            [row for row, kind in enumerate(kinds) if kind == name],
        )
        for name in dict.fromkeys(kind for kind in kinds if kind)
    ]


def probe(kind: Kind, training: Side, test: Side, pictures: int) -> dict[str, Any] | None:
    """A linear probe of pictures against the most frequent training answer; None for few or one-sided questions."""
    truths = [training.answers[row] for row in kind.training]
    wanted = [test.answers[row] for row in kind.test]
    if len(wanted) < FEWEST or len(set(truths)) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced"))
    model.fit(training.features[kind.training, :pictures].numpy(), truths)
    said = model.predict(test.features[kind.test, :pictures].numpy())
    common = Counter(truths).most_common(1)[0][0]
    return {
        "task": kind.task,
        "kind": kind.kind,
        "training": len(truths),
        "test": len(wanted),
        "classes": len(set(truths)),
        "most frequent answer": 100 * float(np.mean([answer == common for answer in wanted])),
        "probe": 100 * float(np.mean(said == np.array(wanted))),
        "guessing, balanced": 100 / len(set(wanted)),
        "probe, balanced": 100 * balanced_accuracy_score(wanted, said),
    }


def routing(statistics: Sequence[TaskStatistics], questions: Mapping[str, Tensor], pictures: int) -> Rows:
    """The share of each task's test questions that a router over all tasks assigns to it, by what the router sees.

    Args:
        statistics: Those of the tasks, in the order of the questions.
        questions: By task, (questions, features), of which the first `pictures` are the picture's.
    """
    rows: Rows = [{"task": name} for name in questions]
    for view, columns in part_columns(pictures).items():
        router = Router([seen(of_task, columns) for of_task in statistics])
        for number, (row, features) in enumerate(zip(rows, questions.values(), strict=True)):
            row[view] = 100 * float((router.route(features[:, columns]) == number).float().mean())
    return [*rows, _mean(rows)]


def held_out(foreign: ForeignQuestions, tasks: Sequence[Task]) -> Rows:
    """For each task and each part of a question: false alarms among the other tasks' questions, detected ones of its
    own, and the area under the ROC curve, if the router has not learned the task; in percent."""
    rows: Rows = [
        {
            "task": name,
            **{
                f"{part}, {title}": value
                for part, found in by_part.items()
                for title, value in {
                    "false alarms": found.false_alarms,
                    "detected": found.detected,
                    "AUROC": 100 * found.auroc,
                }.items()
            },
        }
        for name, by_part in foreign.held_out(len(tasks), tasks).items()
    ]
    return [*rows, _mean(rows)]


def _mean(rows: Rows) -> dict[str, Any]:
    return {"task": "mean", **{name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "task"}}


def seen(statistics: TaskStatistics, columns: slice) -> TaskStatistics:
    """The statistics of some features alone."""
    return replace(statistics, mean=statistics.mean[columns], scatter=statistics.scatter[columns, columns])


if __name__ == "__main__":
    main()
