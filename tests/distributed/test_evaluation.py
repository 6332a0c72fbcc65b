"""Questions divided among ranks are answered as one rank answers them, also by a run that was killed."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

from mslora_cr.cli.main import main
from tests.distributed.launch import launch, start, wait_until

QUESTIONS = 20


def results(folder: Path) -> dict[str, bytes]:
    """Answer files, and the scores without how long they took."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("answer-file.jsonl")}
    cells = json.loads((folder / "tiny" / "evaluation.json").read_text())["cells"]
    return {**found, "cells": json.dumps([{**cell, "seconds": 0} for cell in cells]).encode()}


def test_two_ranks_answer_as_one_does_though_killed(trained_config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["evaluate", str(trained_config), "evaluation.batch_size=1"]
    assert main([*command, f"results_dir={one}"]) == 0

    command.append(f"results_dir={two}")

    def noted() -> dict[str, int]:
        return {file.name[-7:]: file.read_text().count("\n") for file in two.rglob(".answers-*.jsonl")}

    before = random.randint(1, 6)
    launched = start(command)
    wait_until(lambda: sum(noted().values()) >= before or launched.process.exitcode is not None, pause=0.001)
    os.kill(launched.ranks()[1], signal.SIGKILL)
    status, output = launched.finish(60)
    assert status == 1, output[-4000:]
    answered = sum(noted().values())
    assert answered >= 1 and not (two / "tiny" / "evaluation.json").exists()

    launch(command)  # tests/evaluation/test_evaluate.py counts that nothing noted is asked again
    assert results(two) == results(one)
    assert not noted()
    written = {file: file.stat().st_mtime_ns for file in two.rglob("answer-file.jsonl")}
    launch(command)
    assert {
        file: file.stat().st_mtime_ns for file in two.rglob("answer-file.jsonl")
    } == written  # nothing is asked again
