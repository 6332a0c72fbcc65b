"""Questions divided among ranks are answered as one rank answers them, also by a run that was killed."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.data.datasets import EvalDataset
from mslora_cr.data.tasks import task_image_roots
from mslora_cr.data.tasks import test_records as questions_of
from mslora_cr.evaluation.probabilities import PROBABILITIES, read_probabilities
from mslora_cr.models.load import input_processor_of, load_base
from mslora_cr.runs.ledger import finished_banks
from tests.distributed.launch import launch, start, wait_until
from tests.generation.test_log_probabilities import brute_force

QUESTIONS = 20


def results(folder: Path) -> dict[str, bytes]:
    """Answer files, and the scores without how long they took."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("answer-file.jsonl")}
    cells = json.loads((folder / "tiny" / "evaluation.json").read_text())["cells"]
    return {**found, "cells": json.dumps([{**cell, "seconds": 0} for cell in cells]).encode()}


def probabilities(folder: Path) -> dict[tuple[str, int], list[float]]:
    """The log-probabilities of each answer and of its candidates, by file and line."""
    return {
        (str(file.relative_to(folder)), number): [value for value in (of.logprob, *of.logprobs) if value is not None]
        for file in folder.rglob(PROBABILITIES)
        for number, of in enumerate(read_probabilities(file))
    }


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
    known = probabilities(one)
    assert probabilities(two) == {place: pytest.approx(values, abs=1e-5) for place, values in known.items()}
    assert sum(map(bool, known.values())) > QUESTIONS / 2, "answers and candidates have log-probabilities"
    assert not noted()
    written = {file: file.stat().st_mtime_ns for file in two.rglob("answer-file.jsonl")}
    launch(command)
    assert {
        file: file.stat().st_mtime_ns for file in two.rglob("answer-file.jsonl")
    } == written  # nothing is asked again


@pytest.mark.long
def test_two_ranks_score_candidates_of_routed_questions_as_brute_force_does(
    trained_config: Path, tmp_path: Path
) -> None:
    """One forward pass over the whole text of each candidate, with the merged banks of the task that was predicted."""
    launch(["evaluate", str(trained_config), f"results_dir={tmp_path}", "--banks-by", "routed"])
    config = load_config(trained_config)
    base, banks = load_base(config, torch.device("cpu")), finished_banks(config)
    stack, seen = BankStack(base.model, config.lora.fold, reuse=True), 0
    for task in config.stream:
        folder = tmp_path / "tiny" / "routed" / task.name / "stage-3"
        processor = input_processor_of(config, base)
        samples = EvalDataset(questions_of(config, task), task_image_roots(config, task), processor)
        lines = [json.loads(line) for line in (folder / "answer-file.jsonl").read_text().splitlines()]
        for number, (line, of) in enumerate(zip(lines, read_probabilities(folder / PROBABILITIES), strict=True)):
            routed = list(banks).index(line["metadata"]["routed_to"])
            stack.set_frozen(list(banks.values())[: routed + 1])
            stack.model.eval()
            for candidate, logprob in zip(of.candidates, of.logprobs, strict=True):
                tokens = list(processor.answer_ids(samples.records[number].question, 1, candidate))
                assert logprob == pytest.approx(sum(brute_force(base, samples, number, tokens)), abs=1e-5)
                seen += 1
    assert seen >= QUESTIONS
