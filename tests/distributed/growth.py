"""What a process holds after each task; `watch` is called in every rank before the command runs."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import Trainer

from mslora_cr.distributed.comm import rank
from mslora_cr.stream import train as stream

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def watch(folder: Path) -> None:
    """Write two lines to `folder/RANK.jsonl` for each task: the hooks of its model, and what is held when it is done."""
    release_trainer = stream.release_trainer
    file = folder / f"{rank()}.jsonl"

    def release_and_count(trainer: Trainer) -> None:
        training = count_hooks([trainer.model, *trainer.model.modules()], trainer.model.parameters())
        release_trainer(trainer)
        with file.open("a") as opened:
            opened.write(json.dumps({"hooks": training}) + "\n")

    train_task = stream.train_task

    def train_and_count(*args: Any, **kwargs: Any) -> None:
        train_task(*args, **kwargs)
        with file.open("a") as opened:
            opened.write(json.dumps(held()) + "\n")

    stream.release_trainer, stream.train_task = release_and_count, train_and_count


def held() -> dict[str, int]:
    """Without collecting first: the task that follows would be loaded beside what is still there."""
    found = gc.get_objects()
    modules = [thing for thing in found if isinstance(thing, nn.Module)]
    tensors = [thing for thing in found if type(thing) in (torch.Tensor, nn.Parameter)]
    process = psutil.Process()
    return {
        "hooks": count_hooks(modules, tensors) + len(nn.modules.module._global_forward_hooks),
        "modules": len(modules),
        "tensors": len(tensors),
        "objects": len(found),
        "groups": len(torch.distributed.distributed_c10d._world.pg_map),
        "threads": threading.active_count(),
        "native threads": process.num_threads(),
        "files": open_files(process),
        "resident": process.memory_info().rss,
    }


def open_files(process: psutil.Process) -> int:
    """The least of several looks: the thread that watches the launcher opens a file in /proc for a moment every second,
    and closes it only when it gets to run again; what has leaked is there at every look."""
    looks = []
    for _ in range(10):
        looks.append(process.num_fds())
        time.sleep(0.01)
    return min(looks)


def count_hooks(modules: Any, tensors: Any) -> int:
    """Hooks registered on modules and tensors."""
    on_modules = sum(len(getattr(module, name)) for module in modules for name in HOOKS)
    return on_modules + sum(len(tensor._backward_hooks or ()) for tensor in tensors)
