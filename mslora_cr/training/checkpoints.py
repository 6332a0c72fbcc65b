"""Checkpoints inside a task: where they are, which launch wrote them, and whether a run may resume from one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.io import load_bank, save_bank
from mslora_cr.config.schema import ConfigError
from mslora_cr.distributed.comm import DistributedError
from mslora_cr.distributed.deepspeed import zero_stage
from mslora_cr.distributed.launch import lost_a_process
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import replace_folder
from mslora_cr.utils.state import StateError, StateFile

log = logging.getLogger(__name__)

STATE = "bank_trainer.pt"
LAUNCH = "launch.json"
BANK_FOLDER = "bank"
EXTRA_STATE = "magnitudes.safetensors"
"""Trained tensors beside the bank, in a checkpoint's bank folder, for kinds of adapters that have any."""
STAGING = ".saving"
"""The prefix of a checkpoint that is not complete."""


_NO_DAMAGE = (torch.AcceleratorError, torch.OutOfMemoryError, StateError)


class SaveError(UserError):
    """A file cannot be written. Everything that was complete before is kept."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints inside a task, oldest first."""
    folders = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = (path for path in folders if path.is_dir() and path.name.rpartition("-")[2].isdecimal())
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))


class Launch(StateFile):
    """`launch.json` of a checkpoint: what its state on each rank depends on, and what decides the task's bank."""

    MEND: ClassVar[str] = "remove this checkpoint; the task starts from the one before it, or again"

    processes: int
    zero_stage: int = Field(alias="ZeRO stage")
    configuration: str | None = None
    base_model: str | None = Field(default=None, alias="base model")
    training_records: str | None = Field(default=None, alias="training records")
    training_images: str | None = Field(default=None, alias="training images")
    validation_records: str | None = Field(default=None, alias="validation records")

    @classmethod
    def of(cls, args: TrainingArguments, input_digests: Mapping[str, str]) -> Launch:
        """Return the launch to which this process belongs."""
        facts = {"processes": args.world_size, "ZeRO stage": zero_stage(args.deepspeed), **input_digests}
        return cls.model_validate(facts)

    def input_digests(self) -> dict[str, str]:
        """Return the settings that decide the bank, by their names in messages; unknown ones are left out."""
        named = {"configuration", "base_model", "training_records", "training_images", "validation_records"}
        return self.model_dump(by_alias=True, exclude_none=True, include=named)


def check_same_launch(checkpoint: Path, args: TrainingArguments, input_digests: Mapping[str, str], force: bool) -> None:
    """Raise unless this run is launched like the one that wrote a checkpoint inside a task, with the same inputs.

    Args:
        input_digests: Digests of what decides the bank.
        force: Allow another configuration.

    Raises:
        DistributedError: The number of processes or the ZeRO stage differs; between tasks both may change freely.
        ConfigError: The configuration, base model, training records or images differ.
    """
    written = Launch.read(checkpoint / LAUNCH)
    again = f"remove {checkpoint.parent} to start this task again (finished tasks stay)"
    now = Launch.of(args, input_digests)
    if (written.processes, written.zero_stage) != (now.processes, now.zero_stage):
        was, is_now = (f"processes {one.processes}, ZeRO stage {one.zero_stage}" for one in (written, now))
        raise DistributedError(
            f"{checkpoint} was written with {was}; this run has {is_now}. Launch it as before, or {again}; between "
            "tasks both may change"
        )
    free = {"configuration"} if force else set()
    before, after = written.input_digests(), now.input_digests()
    free |= {"training images"} - before.keys()  # an earlier version did not note them
    if before.get("training records") != after.get("training records"):
        free.add("training images")  # other records show other images
    changed = [key for key, value in after.items() if before.get(key) != value and key not in free]
    if changed:
        forced = "; --force continues with the changed configuration" if changed == ["configuration"] else ""
        raise ConfigError(
            f"{checkpoint} was made with another configuration or other files: {', '.join(changed)} changed since. "
            f"Restore what it was, or {again}{forced}"
        )


@contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint in errors of libraries that find it damaged.

    Raises:
        StateError: In place of the library's error.
    """
    try:
        yield
    except Exception as error:  # A damaged pickle may raise nearly anything.
        if checkpoint is None or lost_a_process(error) or isinstance(error, _NO_DAMAGE):
            raise
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise StateError(f"{checkpoint} is damaged and cannot be resumed from ({reason}); {Launch.MEND}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder in errors of libraries when a disk is full or a folder cannot be written.

    Raises:
        SaveError: In place of the library's error.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # PyTorch's writer of files raises a plain RuntimeError.
        if lost_a_process(error) or isinstance(error, _NO_DAMAGE):
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SaveError(
            f"{folder} cannot be written ({reason}). What was complete before is kept; the same command resumes from "
            "there once there is space and permission"
        ) from error


class Publisher:
    """Publishes written checkpoints in a thread: flushes them to disk, names them and drops older ones.

    Until a checkpoint has its name, a run resumes from the one before.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """
        Args:
            keep: How many to keep, at least one.
        """
        self._folder, self._keep = folder, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._last: Future[None] | None = None

    def publish(self, written: Path, at_once: bool) -> None:
        """Begin to publish a folder that bears a checkpoint's name, elsewhere on the same disk.

        Args:
            written: The folder.
            at_once: Return only when it is published.
        """
        self._last = self._pool.submit(self._publish, written)
        if at_once:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is published.

        Raises:
            SaveError: It cannot be published.
        """
        if self._last is not None:
            self._last.result()

    def _publish(self, written: Path) -> None:
        with writing(written):
            replace_folder(written, self._folder / written.name)
        for old in checkpoints(self._folder)[: -self._keep]:
            try:
                shutil.rmtree(old)
            except OSError as error:  # On NFS, somebody may still read a file.
                log.warning("%s is no longer needed, but cannot be removed yet (%s)", old, error)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


BEST_FOLDER = "best"


def stored_numbers(folder: Path) -> tuple[Bank, dict[str, Tensor]]:
    """Return the bank of a folder inside a checkpoint, and the trained tensors beside it."""
    file = folder / EXTRA_STATE
    return load_bank(folder), load_file(file) if file.is_file() else {}


@dataclass(frozen=True)
class BestBank:
    """A bank and its origin.

    Attributes:
        step: The optimizer step of its validation.
        metrics: The figures measured then.
        bank: Its numbers, on the CPU.
        extra_state: Further trained tensors.
    """

    step: int
    metrics: dict[str, float]
    bank: Bank
    extra_state: Mapping[str, Tensor]

    def write(self, checkpoint: Path) -> dict[str, Any]:
        """Write the numbers into a checkpoint, and return the rest for its state."""
        save_bank(self.bank, checkpoint / BEST_FOLDER, beside={EXTRA_STATE: self.extra_state})
        return {"step": self.step, "metrics": self.metrics}

    @classmethod
    def read(cls, checkpoint: Path, state: Mapping[str, Any]) -> BestBank:
        """Read what `write` stored.

        Raises:
            BankError: The numbers are damaged.
        """
        return cls(state["step"], state["metrics"], *stored_numbers(checkpoint / BEST_FOLDER))
