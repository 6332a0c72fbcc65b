"""A rank holds as much after eight tasks as after two."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.data.sources.catalog import catalog
from tests.conftest import first_in_make_test, write_config
from tests.distributed import growth
from tests.distributed.launch import deepspeed_file, launch

LEAST_LEAK = 3_000_000
"""Bytes a task: less than a third of what one tiny model takes, more than the allocator's own drift."""


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3"))
def test_eight_tasks_in_one_launch_leave_nothing_behind(
    stage: str, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    steps = {"epochs": 1, "batch_size": 4, "learning_rate": 0.002}
    settings = {**tiny_settings, "datasets": {}, "tasks": [{"name": name, **steps} for name in catalog()]}
    assert len(settings["tasks"]) == 8
    config = write_config(tmp_path, settings)
    launch(["train", config, *deepspeed_file(stage, tmp_path)], before=functools.partial(growth.watch, tmp_path))
    for rank in (0, 1):
        lines = [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
        training, after = lines[0::2], lines[1::2]
        assert len(after) == 8
        # The first task has no penalties, hence fewer hooks; every later one has as many as the second.
        assert training[1]["hooks"] > training[0]["hooks"] > 0
        assert all(counts == training[1] for counts in training[2:])
        for counts in after:
            assert counts["hooks"] == counts["modules"] == counts["tensors"] == 0
            for name in ("groups", "threads", "native threads", "files"):
                assert counts[name] == after[1][name], name
        assert after[-1]["objects"] - after[1]["objects"] < 1000  # a leaked model has 5,000 a task
        assert after[-1]["resident"] - after[2]["resident"] < 5 * LEAST_LEAK
