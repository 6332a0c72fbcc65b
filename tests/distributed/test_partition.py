"""What ZeRO-3 does not partition goes where the parameters are gathered."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed import buffers
from tests.distributed.conftest import FIXED, write_exact_config
from tests.distributed.launch import BOUND, deepspeed_file, start


def test_buffers_go_where_the_model_computes(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    config = write_exact_config(tmp_path, tiny_settings, FIXED)
    command = ["train", config, "tasks=[pathvqa]", *deepspeed_file("zero3", tmp_path)]
    status, output = start(command, processes=1, before=partial(buffers.look_and_fail, tmp_path)).finish(BOUND)
    assert status == 1 and "ZeroDivisionError: planted" in output, output[-4000:]
    found = json.loads((tmp_path / "buffers.json").read_text())
    assert len(found) >= 3  # the tower's positions, the rotary frequencies twice
    assert {name for name, device in found.items() if device != "meta"} == set()
