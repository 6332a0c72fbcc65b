"""Handles running out of memory in a step that cannot be repeated.

One of several processes, and any process under DeepSpeed, cannot repeat its pass: the others wait in the middle of
theirs. So the run ends, after a note beside the task's checkpoints to recompute more layers, and the next launch
continues from the last checkpoint with them.
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
"""The prefix of the notes' names. Each rank writes one of its own, so that no file has two writers."""
LAUNCHES_OF_RETREAT = 4
"""After this many launches, all layers are recomputed: each launch loads the model again."""
LESS = (
    "To need less memory, use a smaller training.per_device_train_batch_size (more accumulation, the same update), "
    "training.deepspeed=zero3 on several GPUs, or model.quantization=4bit"
)


class MemoryRanOutError(UserError):
    """The device has too little memory for a step. The message says how the run continues, or what needs less
    memory."""


class LayersNote(StateFile):
    """`recomputation-RANK.json` beside a task's checkpoints: memory ran out with so few layers recomputed."""

    MEND: ClassVar[str] = "remove it; training.gradient_checkpointing: auto then decides from measured memory alone"

    recomputed_layers: int = Field(ge=1)
    samples: int = Field(ge=1)
    """The number of samples in a device's batch then; the note does not apply to smaller batches."""


def least_layers(folder: Path, samples: int) -> int:
    """Return how many layers must be recomputed according to earlier launches; the same on every rank.

    Args:
        folder: The folder of the task's checkpoints.
        samples: The number of samples in a device's batch now.

    Raises:
        NewerError: A later version wrote the note.
    """
    notes = [LayersNote.read_if_whole(file) for file in sorted(folder.glob(f"{NOTE}*.json"))]
    noted = [note.recomputed_layers for note in notes if note is not None and samples >= note.samples]
    return max(all_gather_object(max(noted, default=0)))  # A shared file system may show other hosts an older state.


@contextmanager
def noting_more_layers(trainer: Trainer, recomputation: Recomputation) -> Iterator[None]:
    """Wrap a task's training: if memory runs out, say how it can continue, and note it for the next launch.

    Raises:
        MemoryRanOutError: In place of PyTorch's error.
        SaveError: The note cannot be written.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        folder, layers, count = Path(trainer.args.output_dir), recomputation.layers, recomputation.count
        left = checkpoints(folder)
        onward = f"continues from {left[-1]}" if left else "starts this task again"
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
