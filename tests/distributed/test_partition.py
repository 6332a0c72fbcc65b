"""What ZeRO-3 does not partition goes where the parameters are gathered."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed import buffers, pages
from tests.distributed.conftest import FIXED, write_exact_config
from tests.distributed.launch import BOUND, deepspeed_file, launch, start


def test_buffers_go_where_the_model_computes(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    config = write_exact_config(tmp_path, tiny_settings, FIXED)
    command = ["train", config, "tasks=[pathvqa]", *deepspeed_file("zero3", tmp_path)]
    status, output = start(command, processes=1, before=partial(buffers.look_and_fail, tmp_path)).finish(BOUND)
    assert status == 1 and "ZeroDivisionError: planted" in output, output[-4000:]
    found = json.loads((tmp_path / "buffers.json").read_text())
    assert len(found) >= 3  # the tower's positions, the rotary frequencies twice
    assert {name for name, device in found.items() if device != "meta"} == set()


def test_only_the_first_rank_holds_the_merged_weights(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    config = write_exact_config(tmp_path, tiny_settings, FIXED)
    half = ["model.dtype=bfloat16", "training.bf16=true"]  # as the files: another dtype is a copy
    launch(["train", config, *half, *deepspeed_file("zero3", tmp_path)], before=partial(pages.look, tmp_path))
    first, second = (
        [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    )
    assert [task["files"] for task in second] == [task["linears"] for task in second]
    assert first[0]["files"] == first[0]["linears"] and first[1]["files"] == 0
