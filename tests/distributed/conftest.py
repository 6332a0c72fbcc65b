from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.cli import main
from tests.conftest import write_config
from tests.distributed.launch import deepspeed_file, launch

Run = Callable[..., Path]
FIXED = {"alpha": 0.1, "beta": 0.01}
LEARNABLE = {"alpha": -1, "beta": -1}
WITHOUT_DROPOUT = {"rank": 4, "alpha": 8}
"""Each rank draws its own dropout mask, so only without dropout are the numbers those of one process."""
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
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Run:
    """Trains the tiny stream once for each (stage, weights, overrides), and returns its run folder.

    `stage` is `one` for a single process without a launcher; otherwise two processes share each batch of four.
    """
    done: dict[tuple[str, ...], Path] = {}

    def train(stage: str, weights: str = "fixed", *overrides: str) -> Path:
        key = (stage, weights, *overrides)
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            regularization = LEARNABLE if weights == "learnable" else FIXED
            config = write_exact_config(folder, tiny_settings, regularization)
            if stage == "one":
                assert main(["train", str(config), *overrides]) == 0
            else:
                launch(["train", config, *deepspeed_file(stage, folder), *overrides])
            done[key] = folder / "checkpoints" / "tiny"
        return done[key]

    return train


if sys.platform != "linux":  # the tests look for processes in /proc
    collect_ignore_glob = ["test_*.py"]
