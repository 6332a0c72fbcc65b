"""What goes wrong in the tests: each function is called in every rank before the command runs."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mslora_cr.data.collator import TrainingCollator
from mslora_cr.distributed import comm as distributed
from mslora_cr.distributed.comm import rank
from mslora_cr.training import objective
from mslora_cr.training.checkpoints import STAGING
from mslora_cr.training.recomputation import Recomputation
from mslora_cr.training.trainer import BankTrainer
from tests.distributed.launch import wait_until

FILE_BYTES = 20_000
"""Less than the smallest state of an optimizer, more than a ledger or a configuration."""


def penalty_without_gradient() -> None:
    """The published mistake: under ZeRO-3 the penalties' gradient reaches no parameter."""

    objective.penalty_hook = lambda pending, key: lambda gradient: gradient


def at_step(number: int, on_rank: int, act: Callable[[], None]) -> None:
    """Do something on one rank before the launch's step of that number, when every checkpoint before it has its name."""
    step, steps = BankTrainer.training_step, 0

    def training_step(self: BankTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if rank() == on_rank and steps == number:
            wait_until(lambda: not any(Path(self.args.output_dir).glob(f"{STAGING}*/*")))
            act()
        return step(self, *args, **kwargs)

    BankTrainer.training_step = training_step  # type: ignore[method-assign]


def out_of_memory(step: int, on_rank: int, layers: int) -> None:
    """In the backward pass of a step of the first task, on one rank, with fewer layers recomputed than that."""
    make_step = BankTrainer.training_step

    def training_step(self: BankTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        def fail(gradient: torch.Tensor) -> None:
            if self.recomputation.count < layers:
                wait_until(lambda: not any(Path(self.args.output_dir).glob(f"{STAGING}*/*")))
                raise torch.OutOfMemoryError("planted")

        if (rank(), self.state.global_step + 1, self.args.run_name) == (on_rank, step, "tiny/pathvqa"):
            # Of the first layer: the gradients of others have been exchanged already.
            next(iter(self.stack.trainable_parameters())).register_hook(fail)
        return make_step(self, *args, **kwargs)

    BankTrainer.training_step = training_step  # type: ignore[method-assign]


def exception_on_rank_1() -> None:
    """A bug that only rank 1 runs into, at the second step."""

    def fail() -> None:
        raise ZeroDivisionError("planted")

    at_step(2, 1, fail)


def second_batch_on_rank_1(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Do something with rank 1's second batch."""
    collate, batches = TrainingCollator.__call__, 0

    def call(self: TrainingCollator, samples: Any) -> dict[str, torch.Tensor]:
        nonlocal batches
        batches += 1
        batch = collate(self, samples)
        if rank() == 1 and batches == 2:
            change(batch)
        return batch

    TrainingCollator.__call__ = call  # type: ignore[method-assign]


def nan_on_rank_1() -> None:
    """Pixels that are no numbers."""
    at_step(2, 1, lambda: None)
    second_batch_on_rank_1(lambda batch: batch["pixel_values"].fill_(torch.nan))


def broken_images_on_rank_1(parent: Path) -> None:
    """Rank 1's own copy of the images is overwritten once its second batch has been read."""
    folder_of_its_own(parent)

    def overwrite(batch: dict[str, torch.Tensor]) -> None:
        for image in Path("data").rglob("*.png"):
            image.write_bytes(b"no image")

    second_batch_on_rank_1(overwrite)


def read_only(mount: Path, number: int) -> None:
    """From the launch's step of that number on, nothing can be written below a mount point."""
    at_step(number, 0, lambda: subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True))


def full_disk() -> None:
    """No file may grow beyond a few kilobytes; the error is one of the disk's own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY))


def folder_of_its_own(parent: Path) -> None:
    """Relative paths lead each rank elsewhere, as on hosts that share no file system."""
    os.chdir(parent / str(rank()))
    distributed.SHARED_FOLDER_SECONDS = 1


def measured_memory() -> None:
    """As on a GPU, memory is measured before the first step of a task; it is found to suffice for everything."""
    decide, fork = Recomputation.decide, torch.random.fork_rng

    def on_a_gpu(self: Recomputation, run: str, device: torch.device, *rest: Any) -> None:
        decide(self, run, torch.device("cuda"), *rest)

    Recomputation.decide = on_a_gpu  # type: ignore[method-assign, assignment]
    torch.random.fork_rng = lambda devices=(), **options: fork([], **options)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda device: 0)
    torch.cuda.mem_get_info = lambda device: (2**34, 2**34)  # type: ignore[assignment]
