"""Memory that runs out where a step cannot be made again: the run ends with a note, and the next launch goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import bank_bytes, first_in_make_test
from tests.distributed import faults
from tests.distributed.launch import BOUND, launch, start
from tests.distributed.test_failures import STEPS, Stream

AUTO = "training.gradient_checkpointing=auto"


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero2", "zero3"))
def test_on_one_of_two_ranks(
    stage: str, tiny_settings: dict[str, Any], tmp_path: Path, whole: Callable[[str], dict[str, bytes]]
) -> None:
    """With fewer than two of three layers recomputed. The next launch runs out again, and is started again in place."""
    stream = Stream(tmp_path, tiny_settings, stage, AUTO)
    fault = partial(faults.out_of_memory, STEPS - 1, 1, 2)
    status, output = start(stream.command, before=fault).finish(BOUND)
    assert status == 1
    message = (
        "error on rank 1: tiny/pathvqa: memory ran out at step 3 with {} of 3 decoder layers recomputed (planted). Run "
        f"the same command again: it continues from {stream.run / 'work' / 'pathvqa' / 'checkpoint-2'}, with {{}} of 3 "
        "recomputed, to the same bank"
    )
    assert output.count("mslora-cr: error") == output.count(message.format(0, 1)) == 1, output[-4000:]
    status, output = start(stream.command, before=fault, restarts=1).finish()
    assert status == 0, output[-4000:]
    assert output.count("mslora-cr: error") == output.count(message.format(1, 2)) == 1, output[-4000:]
    chosen = "tiny/pathvqa: the activations of {} of 3 decoder layers are recomputed: memory ran out with fewer"
    assert [output.count(chosen.format(count)) for count in (0, 1, 2, 3)] == [0, 1, 1, 0]
    assert output.count("pathvqa: resumes after step 2") == 2
    assert bank_bytes(stream.run) == whole(stage)
    assert not stream.checkpoints()


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_in_a_process_of_its_own_under_deepspeed(stage: str, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Before the first checkpoint: the task begins again."""
    one_task = ("tasks=[pathvqa]", AUTO)
    whole, stream = (Stream(tmp_path / name, tiny_settings, stage, *one_task) for name in ("whole", "broken"))
    launch(whole.command, processes=1)
    fault = partial(faults.out_of_memory, 1, 0, 1)
    status, output = start(stream.command, processes=1, before=fault).finish(BOUND)
    assert status == 1
    assert "memory ran out at step 1 with 0 of 3" in output and "it starts this task again, with 1 of 3" in output
    launch(stream.command, processes=1, before=fault)
    assert bank_bytes(stream.run) == bank_bytes(whole.run)


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3", "zero2"))
def test_measuring_moves_no_number(
    stage: str, tiny_settings: dict[str, Any], tmp_path: Path, whole: Callable[[str], dict[str, bytes]]
) -> None:
    stream = Stream(tmp_path, tiny_settings, stage, AUTO)
    output = launch(stream.command, before=faults.measured_memory)
    assert output.count("the activations of 0 of 3 decoder layers are recomputed: 0.00 GB for each layer") == 2
    assert bank_bytes(stream.run) == whole(stage)
