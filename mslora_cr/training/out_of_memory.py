"""Handles running out of memory in a step that cannot be repeated.

One of several processes, and any under DeepSpeed, cannot repeat its pass: the others wait in the middle of theirs. So
the run ends, after a note beside the task's checkpoints that more layers are to be recomputed, and the next launch
goes on from the last checkpoint with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from transformers import Trainer

from mslora_cr.distributed.comm import all_gather_object, rank
from mslora_cr.training.checkpoints import checkpoints, writing
from mslora_cr.training.recomputation import Recomputation
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.state import StateFile

NOTE = "recomputation-"
"""How the notes' names begin; each rank writes one of its own, so that none is written by two."""
LAUNCHES_OF_RETREAT = 4
"""After so many launches at most, all layers are recomputed: each loads the model again."""
LESS = (
    "Less memory is needed with a smaller training.per_device_train_batch_size (more accumulation, the same update), "
    "with training.deepspeed=zero3 on several GPUs, or with model.quantization=4bit"
)


class MemoryRanOutError(UserError):
    """The device has too little memory for a step; the message says how the run goes on, or what needs less."""


class LayersNote(StateFile):
    """`recomputation-RANK.json` beside a task's checkpoints: memory ran out there with fewer layers recomputed."""

    MEND: ClassVar[str] = "remove it; training.gradient_checkpointing: auto then decides from measured memory alone"

    recomputed_layers: int = Field(ge=1)
    samples: int = Field(ge=1)
    """The number of samples in a device's batch at that time; the note does not apply to smaller batches."""


def least_layers(folder: Path, samples: int) -> int:
    """How many layers must be recomputed, as far as earlier launches found out: the same on every rank.

    Args:
        folder: of the task's checkpoints.
        samples: in a device's batch now.

    Raises:
        NewerError: the note is of a later version.
    """
    notes = [LayersNote.read_if_whole(file) for file in sorted(folder.glob(f"{NOTE}*.json"))]
    noted = [note.recomputed_layers for note in notes if note is not None and samples >= note.samples]
    return max(all_gather_object(max(noted, default=0)))  # a shared file system may show other hosts an older state


@contextmanager
def noting_more_layers(trainer: Trainer, recomputation: Recomputation) -> Iterator[None]:
    """Around a task's training: where memory runs out, say how it can go on, and note it for the next launch.

    Raises:
        MemoryRanOutError: instead of PyTorch's error. SaveError: the note cannot be written.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        folder, layers, count = Path(trainer.args.output_dir), recomputation.layers, recomputation.count
        left = checkpoints(folder)
        onward = f"goes on from {left[-1]}" if left else "begins this task again"
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        where = f"{trainer.args.run_name}: memory ran out at step {trainer.state.global_step + 1}"
        if count == layers:
            raise MemoryRanOutError(
                f"{where}, although all {layers} decoder layers are recomputed ({reason}). {LESS}. With a smaller "
                f"batch the same command {onward}; for the others, remove {folder} to start this task again"
            ) from error
        where += f" with {count} of {layers} decoder layers recomputed ({reason})"
        if recomputation.setting != "auto":
            raise MemoryRanOutError(
                f"{where}. Set training.gradient_checkpointing to true or auto: the command then {onward}, to the same "
                f"bank. {LESS}"
            ) from error
        more = min(layers, count + -(-layers // LAUNCHES_OF_RETREAT))
        note = folder / f"{NOTE}{rank()}.json"
        with writing(note):
            folder.mkdir(parents=True, exist_ok=True)
            LayersNote(recomputed_layers=more, samples=trainer.args.per_device_train_batch_size).write(note)
        raise MemoryRanOutError(
            f"{where}. Run the same command again: it {onward}, with {more} of {layers} recomputed, to the same bank"
        ) from error
