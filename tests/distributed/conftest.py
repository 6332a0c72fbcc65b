from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.cli.main import main
from tests.conftest import bank_bytes, once, write_config
from tests.distributed.launch import deepspeed_file, launch, run

Run = Callable[..., Path]
LAUNCHERS = {"ddp": "accelerate", "zero2": "deepspeed", "zero3": "torchrun"}
FIXED = {"alpha": 0.1, "beta": 0.01}
LEARNABLE = {"alpha": -1, "beta": -1}
WITHOUT_DROPOUT = {"rank": 4, "alpha": 8}
"""Dropout masks depend on how a batch is split, so only without dropout are the numbers those of one process."""
TWO_TASKS = "tasks=[pathvqa, slake-vqarad]"
ADAM_EPSILON = 1e-6
"""Adam scales gradients far above its epsilon, 1e-8 otherwise, to one size, so a gradient of 1e-8 that is all rounding
error would move its number as far as any other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.distributed)


def write_exact_config(folder: Path, settings: dict[str, Any], regularization: dict[str, float]) -> Path:
    """The tiny configuration without what makes runs differ that are spread differently."""
    training = {**settings["training"], "adam_epsilon": ADAM_EPSILON}
    return write_config(folder, settings, lora=WITHOUT_DROPOUT, training=training, regularization=regularization)


@pytest.fixture(scope="session")
def trained(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Run:
    """Trains the tiny stream once for each (stage, weights, overrides), and returns its run folder.

    `stage` is `one` for a single process without a launcher; otherwise two processes share each batch of four. With
    fixed weights and no overrides those of `LAUNCHERS` are started by the user's script, each by another launcher.
    """

    def train(stage: str, weights: str = "fixed", *overrides: str) -> Path:
        def build(folder: Path) -> None:
            config = write_exact_config(folder, tiny_settings, LEARNABLE if weights == "learnable" else FIXED)
            command = ["train", config, *overrides]
            if stage == "one":
                assert main([str(word) for word in command]) == 0
            elif stage in LAUNCHERS and weights == "fixed" and not overrides:
                script = ("bash", "scripts/launch.sh", *command, "--gpus", "2")
                run(*script, "--launcher", LAUNCHERS[stage], *deepspeed_file(stage, folder))
            else:
                launch([*command, *deepspeed_file(stage, folder)])

        key = hashlib.sha256(repr((stage, weights, overrides)).encode()).hexdigest()[:16]
        return once(shared_tmp / f"trained-{key}", build) / "checkpoints" / "tiny"

    return train


@pytest.fixture(scope="session")
def whole(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Callable[[str], dict[str, bytes]]:
    """The banks of an uninterrupted run of two processes under a stage, with dropout and a learnable weight."""

    def train(stage: str) -> dict[str, bytes]:
        def build(folder: Path) -> None:
            launch(["train", write_config(folder, tiny_settings), TWO_TASKS, *deepspeed_file(stage, folder)])

        return bank_bytes(once(shared_tmp / f"whole-{stage}", build) / "checkpoints" / "tiny")

    return train


if sys.platform != "linux":  # the tests look for processes in /proc
    collect_ignore_glob = ["test_*.py"]
