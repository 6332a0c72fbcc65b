"""Collectives for the processes of a run: one process group, one error message, equal facts on every rank."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mslora_cr.config.schema import ConfigError
from mslora_cr.utils.errors import UserError

SHARED_FOLDER_SECONDS = 60
"""The longest delay with which a shared file system shows one host what another has written."""


class DistributedError(UserError):
    """The processes of a run do not match."""


def rank() -> int:
    """Return this process's number among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Return how many processes a launcher started; 1 without one.

    Raises:
        DistributedError: The environment has no number in its place.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal():
        raise DistributedError(f"WORLD_SIZE={text} in the environment is no number of processes; unset it")
    return int(text)


def get_device(setting: str) -> torch.device:
    """Return the device of this process's model.

    Args:
        setting: `model.device`. `auto` means this process's own GPU, or the CPU without a GPU.

    Raises:
        ConfigError: A GPU was asked for, but there is none.
    """
    available = torch.cuda.is_available()
    if setting == "cuda" and not available:
        raise ConfigError(
            "model.device is cuda, but PyTorch sees no GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and that "
            "torch.version.cuda is not None, or set model.device=auto"
        )
    if setting == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0)


def barrier() -> None:
    """Wait until every rank has arrived here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def broadcast_object(value: Any) -> Any:
    """Return the first rank's value, on every rank."""
    box = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box)
    return box[0]


def of_first_rank(tensor: Tensor) -> Tensor:
    """Return the first rank's tensor, on every rank, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, src=0)
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of every rank's tensor, on the CPU of every rank."""
    if not torch.distributed.is_initialized():
        return tensor
    total = tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor.clone()
    torch.distributed.all_reduce(total)
    return total.cpu()


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def assert_same_on_all_ranks(facts: Mapping[str, Any]) -> None:
    """Check that all ranks have the same facts; every rank learns the result.

    Raises:
        DistributedError: On every rank. The message names the first fact that differs, and where.
    """
    everyone = all_gather_object(dict(facts))
    for name in facts:
        for other, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise DistributedError(
                    f"rank {other} and rank 0 differ in {name}: {theirs.get(name)!r} and {everyone[0].get(name)!r}. "
                    "Every host must see the same files (a shared folder, or equal copies) and the same packages"
                )


def assert_shared_fs(folder: Path) -> None:
    """Check that a folder is the same one on every rank.

    Raises:
        DistributedError: On every rank, if the first rank's mark does not appear on another.
    """
    if not torch.distributed.is_initialized():
        return
    mark = Path(broadcast_object(str(folder / f".seen-by-all-{uuid.uuid4().hex}")))
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier()
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    unseen = [other for other, sees in enumerate(all_gather_object(seen)) if not sees]
    if rank() == 0:
        mark.unlink()
    if unseen:
        raise DistributedError(
            f"{folder} is not shared: what rank 0 writes there does not appear on rank {unseen[0]}. Put "
            "output_dir and results_dir on a file system that all hosts share"
        )
