"""Each way to train under ZeRO-3, which shards the most: two processes give the numbers of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mslora_cr.cli import main
from tests.conftest import once, write_config
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


@pytest.fixture(scope="session")
def both(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Path:
    """Every method trained in `one` process and in `two`: one launch for all, because most of a launch is imports."""

    def build(folder: Path) -> None:
        for method in SETTINGS:
            assert main(["train", str(configure(folder / "one" / method, tiny_settings, method))]) == 0
        stage = deepspeed_file("zero3", folder)[0].removeprefix("training.deepspeed=")
        configs = [configure(folder / "two" / method, tiny_settings, method, deepspeed=stage) for method in SETTINGS]
        launch(configs, module="tests.distributed.train_several")

    return once(shared_tmp / "methods-on-two", build)


def configure(folder: Path, settings: dict[str, Any], method: str, **training: str) -> Path:
    section = {method: SETTINGS[method]} if SETTINGS[method] else {}
    # Distillation is averaged over micro-batches by the trainer's own code; the rest is by what test_exactness.py tries.
    exact = {"adam_epsilon": ADAM_EPSILON, "per_device_train_batch_size": 1 if method == "lwf" else 4}
    changes = {
        "lora": WITHOUT_DROPOUT,
        "regularization": FIXED,
        "training": {**settings["training"], **exact, **training},
        "tasks": [task for task in settings["tasks"] if task["name"] in TASKS],
    }
    return write_config(folder, settings, method=method, **changes, **section)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_under_zero3_gives_the_numbers_of_one_process(method: str, both: Path) -> None:
    runs = [both / processes / method / "checkpoints" / "tiny" for processes in ("two", "one")]
    compare_runs(runs[0], runs[1], TASKS[:1] if method == "joint" else TASKS)
    ours, theirs = ([load_file(file) for file in sorted(run.glob("banks/*/memory.safetensors"))] for run in runs)
    assert len(ours) == len(theirs) == (2 if method in ("ewc", "replay") else 0)
    assert all(deviation(mine, other) <= 1e-5 for mine, other in zip(ours, theirs, strict=True))
