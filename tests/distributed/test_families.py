"""Models with a processor of their own under DeepSpeed: the numbers are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mslora_cr.cli.main import main
from tests.conftest import once
from tests.distributed.conftest import FIXED, write_exact_config
from tests.distributed.launch import compare_runs, deepspeed_file, launch
from tests.helpers.families import make

pytestmark = pytest.mark.long
TASKS = ("pathvqa", "slake-vqarad")


def settings_of(family: str, shared_tmp: Path, tiny_settings: dict[str, Any]) -> dict[str, Any]:
    path = once(shared_tmp / f"zero-{family}", lambda place: make(family, place))
    tasks = [{**task, "batch_size": 4} for task in tiny_settings["tasks"][:2]]
    return {**tiny_settings, "model": {**tiny_settings["model"], "path": str(path)}, "tasks": tasks}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_give_the_numbers_of_one(
    stage: str, family: str, shared_tmp: Path, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings_of(family, shared_tmp, tiny_settings)

    def alone(place: Path) -> None:
        assert main(["train", str(write_exact_config(place, settings, FIXED))]) == 0

    one = once(shared_tmp / f"zero-{family}-one", alone) / "checkpoints" / "tiny"
    config = write_exact_config(tmp_path, settings, FIXED)
    launch(["train", config, *deepspeed_file(stage, tmp_path)])
    compare_runs(tmp_path / "checkpoints" / "tiny", one, TASKS)
