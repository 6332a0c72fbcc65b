"""Each way to train under ZeRO-3, which shards the most: two processes give the numbers of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mslora_cr.cli import main
from tests.conftest import write_config
from tests.distributed.conftest import ADAM_EPSILON, FIXED, WITHOUT_DROPOUT
from tests.distributed.launch import compare_runs, deepspeed_file, deviation, launch

TASKS = ("pathvqa", "slake-vqarad")
SETTINGS: Mapping[str, dict[str, Any]] = {
    "olora": {"lambda_1": 0.5, "lambda_2": 0.1},
    "ewc": {"strength": 1e4, "fisher_batches": 2},
    "lwf": {},
    "replay": {"buffer_size": 4},
    "moe_lora": {"experts": 2},
    "joint": {},
}
"""Every method with a way of its own to train. test_exactness.py has mslora_cr, under every stage; each, sequential and
incremental have nothing that these have not."""


def configure(folder: Path, settings: dict[str, Any], method: str) -> Path:
    section = {method: SETTINGS[method]} if SETTINGS[method] else {}
    # Distillation is averaged over micro-batches by the trainer's own code; the rest is by what test_exactness.py tries.
    exact = {"adam_epsilon": ADAM_EPSILON, "per_device_train_batch_size": 1 if method == "lwf" else 4}
    changes = {
        "lora": WITHOUT_DROPOUT,
        "regularization": FIXED,
        "training": {**settings["training"], **exact},
        "tasks": [task for task in settings["tasks"] if task["name"] in TASKS],
    }
    return write_config(folder, settings, method=method, **changes, **section)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_under_zero3_gives_the_numbers_of_one_process(
    method: str, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    assert main(["train", str(configure(tmp_path / "one", tiny_settings, method))]) == 0
    launch(["train", configure(tmp_path / "two", tiny_settings, method), *deepspeed_file("zero3", tmp_path)])
    runs = [tmp_path / processes / "checkpoints" / "tiny" for processes in ("two", "one")]
    compare_runs(runs[0], runs[1], TASKS[:1] if method == "joint" else TASKS)
    ours, theirs = ([load_file(file) for file in sorted(run.glob("banks/*/memory.safetensors"))] for run in runs)
    assert len(ours) == len(theirs) == (2 if method in ("ewc", "replay") else 0)
    assert all(deviation(mine, other) <= 1e-5 for mine, other in zip(ours, theirs, strict=True))
