"""Validation by two processes: the figures of one, the same decision on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mslora_cr.cli.main import main
from mslora_cr.config.run_files import LEDGER
from mslora_cr.runs.entries import RunLedger
from tests.conftest import first_in_make_test, write_config
from tests.distributed.conftest import ADAM_EPSILON, WITHOUT_DROPOUT
from tests.distributed.launch import deepspeed_file, launch


@pytest.mark.parametrize("stage", first_in_make_test("zero3", "ddp", "zero2"))
def test_ranks_measure_together_and_decide_alike(stage: str, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    validation = {"eval_strategy": "steps", "eval_steps": 1, "keep": "best", "greater_is_better": True, "patience": 2}
    changes = {
        "method": "ewc",  # whose state is computed with the bank that is kept
        "lora": WITHOUT_DROPOUT,
        "regularization": {},
        "data": {**tiny_settings["data"], "validation": 0.25},
        "training": {**tiny_settings["training"], "adam_epsilon": ADAM_EPSILON, **validation},
        "tasks": [{**tiny_settings["tasks"][0], "epochs": 2}],
    }
    runs = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        config = write_config(folder, tiny_settings, **changes)
        if folder.name == "one":
            assert main(["train", str(config)]) == 0
        else:
            launch(["train", config, *deepspeed_file(stage, folder)])
        runs.append(RunLedger.read(folder / "checkpoints" / "tiny" / LEDGER).tasks["pathvqa"])
    one, two = runs
    assert (two.steps, two.kept_step) == (one.steps, one.kept_step) == (3, 1)
    assert two.validation is not None and one.validation is not None
    assert {"eval_loss", "eval_exact match score"} <= one.validation.keys()
    assert two.validation == {name: pytest.approx(value, rel=1e-5) for name, value in one.validation.items()}
