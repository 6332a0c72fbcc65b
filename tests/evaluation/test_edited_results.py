"""An edited `evaluation.json` whose types are right and whose contents are not ends in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.utils.state import StateError

Content = dict[str, Any]


def content() -> Content:
    cell = {"stage": 1, "banks": ["a"], "questions": "q", "rows": 1, "fingerprint": "f", "seconds": 1.0}
    return {
        "run": "r",
        "method": "each",
        "banks_by": "prefix",
        "tasks": ["a", "b"],
        "modalities": {"a": "x", "b": "y"},
        "published": {"a": None, "b": None},
        "stages": [1],
        "cells": [{**cell, "task": "a", "answers": "a/answer-file.jsonl", "metrics": {"exact": 1.0}, "intervals": {}}],
        "environment": {},
    }


def change(key: str, value: Any) -> Callable[[Content], None]:
    return lambda evaluation: evaluation.update({key: value})


def change_cell(key: str, value: Any) -> Callable[[Content], None]:
    return lambda evaluation: evaluation["cells"][0].update({key: value})


def repeat_cell(evaluation: Content) -> None:
    evaluation["cells"] *= 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("tasks", []), "tasks: expected the stream's tasks, each once"),
        (change("tasks", ["a", "b", "a"]), "tasks: expected the stream's tasks, each once"),
        (change("tasks", ["b", "c"]), "modalities: there is no entry of task 'c'"),
        (change("modalities", {"a": "x"}), "modalities: there is no entry of task 'b'"),
        (change("published", {}), "published: there is no entry of task 'a'"),
        (change("stages", []), r"stages: \[\] are not those of the cells"),
        (change("stages", [1, 2]), r"stages: \[1, 2\] are not those of the cells"),
        (repeat_cell, "cells: a task appears twice at one stage"),
        (change_cell("task", "c"), r"cells\[0\]: task 'c' at stage 1 is outside the matrix"),
        (change_cell("answers", "../../a/answer-file.jsonl"), r"cells\[0\].answers: .* leads out"),
        (change_cell("answers", "/etc/answer-file.jsonl"), r"cells\[0\].answers: .* leads out"),
        (change_cell("rows", -1), r"cells\[0\]: rows and figures of task 'a' are no results"),
    ],
)
def test_contents_that_do_not_fit_are_refused(edit: Callable[[Content], None], message: str, tmp_path: Path) -> None:
    evaluation = content()
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert read_evaluation(tmp_path) is not None
    edit(evaluation)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(StateError, match=message):
        read_evaluation(tmp_path)


def test_a_stage_beyond_the_stream_is_refused(tmp_path: Path) -> None:
    evaluation = content()
    evaluation["stages"] = [7]
    evaluation["cells"][0]["stage"] = 7
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(StateError, match="at stage 7 is outside the matrix"):
        read_evaluation(tmp_path)
