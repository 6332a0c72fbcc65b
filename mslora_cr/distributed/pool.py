"""Work in parallel processes, each with a device or a share of the cores of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mslora_cr.config.trust import name_method, named_methods
from mslora_cr.distributed.comm import get_device
from mslora_cr.utils.files import append_to
from mslora_cr.utils.workers import cores, end_with_parent


def devices(device: str, jobs: int | None = None) -> list[str | None]:
    """Return the devices of parallel runs: one GPU each, as `CUDA_VISIBLE_DEVICES` names it, or None for a share of the
    CPU cores."""
    if get_device(device).type == "cpu":
        return [None] * (jobs or cores())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [gpus[number % len(gpus)] for number in range(jobs or len(gpus))]


@contextmanager
def worker_pool(devices: Sequence[str | None]) -> Iterator[ProcessPoolExecutor]:
    """Start new processes, one for each device. An error in the block cancels the work that has not begun.

    Args:
        devices: As `devices` gives them.
    """
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, cores() // len(devices))
    with ProcessPoolExecutor(len(devices), context, _init_worker, (free, threads, named_methods())) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _init_worker(free: Any, threads: int, methods: Collection[str]) -> None:
    """Give a worker its GPU or its share of the cores, and end it with the process that started it."""
    end_with_parent()
    for method in methods:
        name_method(method)
    device = free.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)


def spare_imports() -> None:
    """Exempt everything that is alive between two runs from garbage collection: libraries, mostly. Each of the dozen
    collections of a run would look through them again, for 0.4 s."""
    gc.collect()
    gc.freeze()


@contextmanager
def output_into(path: Path) -> Iterator[None]:
    """Redirect everything that this process prints, libraries included, into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    originals = os.dup(1), os.dup(2)
    with append_to(path) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, old in zip((1, 2), originals, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
