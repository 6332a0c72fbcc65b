"""Nothing but the current bank is ever written, neither in memory nor into a checkpoint inside a task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mslora_cr.models.shapes import language_linear_shapes
from tests.conftest import STEPS, first_in_make_test
from tests.distributed import frozen
from tests.distributed.conftest import FIXED, TWO_TASKS, WITHOUT_DROPOUT, write_exact_config
from tests.distributed.launch import BOUND, deepspeed_file, start

SECOND = "slake-vqarad"
MOMENTS = {"ddp": 2, "zero1": 3, "zero2": 3, "zero3": 3}
"""Numbers that AdamW keeps for each of a bank's: its two moments, and DeepSpeed's copy to train."""


def tensors(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from tensors(inner)


def numbers(content: Any) -> int:
    """How many floating-point numbers, without the scalars that count steps."""
    return sum(tensor.numel() for tensor in tensors(content) if tensor.is_floating_point() and tensor.dim())


@pytest.mark.parametrize(
    ("stage", "merge_mode"),
    first_in_make_test(
        *((stage, "merge") for stage in ("zero3", "ddp")),
        *((stage, "concatenate") for stage in ("zero3", "ddp", "zero1", "zero2")),
    ),
)
def test_nothing_but_the_live_bank_is_written(
    stage: str, merge_mode: str, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    """Looked at in the second task, two updates and a checkpoint after its start, with the first bank merged."""
    config = write_exact_config(tmp_path, tiny_settings, FIXED)
    command = ["train", config, TWO_TASKS, f"lora.fold={merge_mode}", *deepspeed_file(stage, tmp_path)]
    look = partial(frozen.look_and_fail, tmp_path, STEPS["pathvqa"] + 3)
    status, output = start(command, before=look).finish(BOUND)
    assert (status, output.count("ZeroDivisionError: planted")) == (1, 1), output[-4000:]

    linears = language_linear_shapes(Path(tiny_settings["model"]["path"]))
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["changed"] == []
        assert seen["compared"] > 2 * len(linears) * (2 if merge_mode == "concatenate" else 1)

    [checkpoint] = (tmp_path / "checkpoints" / "tiny" / "work" / SECOND).glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    saved = checkpoint / "bank" / "adapter_model.safetensors"
    bank = numbers(load_file(saved))
    assert bank == sum(WITHOUT_DROPOUT["rank"] * (rows + columns) for rows, columns in linears.values())
    model_files = list(checkpoint.rglob("*_model_states.pt"))
    assert len(model_files) == {"ddp": 0, "zero3": 2}.get(stage, 1)
    for file in model_files:
        state = torch.load(file, weights_only=True)
        assert len(state["module"]) == 2 * len(linears) and all(".live." in name for name in state["module"])
        assert state["frozen_param_shapes"] is state["frozen_param_fragments"] is None
        assert numbers(state) == (0 if stage == "zero3" else bank)
    optimizer_files = [*checkpoint.rglob("*_optim_states.pt"), *checkpoint.glob("optimizer.pt")]
    assert len(optimizer_files) == (1 if stage == "ddp" else 2)
    states = [torch.load(file, weights_only=stage == "ddp") for file in optimizer_files]  # DeepSpeed's hold its classes
    assert numbers(states) == MOMENTS[stage] * bank
    for file in checkpoint.rglob("*"):
        assert not file.is_file() or file.stat().st_size < 3 * saved.stat().st_size, file
