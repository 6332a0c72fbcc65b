"""Checkpoints inside a task: where they are, what wrote them, and whether a run may resume from one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mslora_cr.config.schema import ConfigError
from mslora_cr.distributed.comm import DistributedError
from mslora_cr.distributed.deepspeed import zero_stage
from mslora_cr.distributed.launch import lost_a_process
from mslora_cr.utils.errors import UserError

STATE = "bank_trainer.pt"
LAUNCH = "launch.json"
BANK_FOLDER = "bank"


class SaveError(UserError):
    """Something cannot be written; what was complete before is kept."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints inside a task, oldest first."""
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def launch(args: TrainingArguments) -> dict[str, int]:
    """What a checkpoint's state on each rank depends on."""
    return {"processes": args.world_size, "ZeRO stage": zero_stage(args.deepspeed)}


def check_same_launch(checkpoint: Path, args: TrainingArguments, input_digests: Mapping[str, str], force: bool) -> None:
    """Raise unless this run is launched as the one that wrote a checkpoint inside a task, and of the same content.

    Args:
        force: another configuration is all right.

    Raises:
        DistributedError: another number of processes or ZeRO stage; between tasks both may change freely.
        ConfigError: another configuration, base model or training records.
    """
    written = json.loads((checkpoint / LAUNCH).read_text(encoding="utf-8"))
    again = f"remove {checkpoint.parent} to start this task again (finished tasks stay)"
    now = launch(args)
    before = {key: written.get(key) for key in now}
    if before != now:
        was, is_now = (", ".join(f"{key} {value}" for key, value in facts.items()) for facts in (before, now))
        raise DistributedError(
            f"{checkpoint} was written with {was}; this run has {is_now}. Launch it as before, or {again}; between "
            "tasks both may change"
        )
    free = {"configuration"} if force else set()
    changed = [key for key, value in input_digests.items() if written.get(key) != value and key not in free]
    if changed:
        forced = "; --force continues with the changed configuration" if changed == ["configuration"] else ""
        raise ConfigError(
            f"{checkpoint} was made with another configuration or other files: {', '.join(changed)} changed since. "
            f"Restore what it was, or {again}{forced}"
        )


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Name the place in what libraries raise when a disk is full or a folder cannot be written.

    Raises:
        SaveError: instead of the library's own error.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # PyTorch's writer of files raises a plain RuntimeError.
        if lost_a_process(error) or isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SaveError(
            f"{place} cannot be written ({reason}). What was complete before is kept; the same command resumes from "
            "there once there is space and permission"
        ) from error
