"""Peak memory of a training step with logits at labelled positions alone, against one with all logits.

    python -m benchmarks.memory                    # 8 x 640 tokens, 32,000 words, gradient checkpointing

Each measurement is a process of its own, that takes two steps with 8 banks, 7 of them merged. On the CPU its figure is
the process's largest resident size, Python and all libraries included, with MALLOC_MMAP_THRESHOLD_ set so that glibc
gives freed blocks back and the figure is what is held; on a GPU it is the most that tensors took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Setting, finish, language_model, parse, random_banks, random_batch
from mslora_cr.banks.stack import BankStack
from mslora_cr.training.trainer import loss_mask

BANKS = 8
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
VARIANTS = ("labelled logits", "full logits")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("memory", __doc__, argv, _add_arguments, size="long")
    if setting.args.variant is not None:
        print(json.dumps(_measure(setting, setting.args.variant == "full logits")))
        return {}
    peaks: dict[str, list[float]] = {name: [] for name in VARIANTS}
    before: dict[str, list[float]] = {f"{name}, before the step": [] for name in VARIANTS}
    for _ in range(setting.repetitions):
        for name in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.memory", *setting.argv, "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK)
            found = json.loads(done.stdout.splitlines()[-1])
            peaks[name].append(found["peak"])
            before[f"{name}, before the step"].append(found["before"])
    return finish(
        setting,
        {**peaks, **before},
        {"full_logits_over_ours": ("full logits", "labelled logits")},
        unit="GB",
        extra={
            "growth_full_logits_over_ours": (peaks["full logits"][0] - before["full logits, before the step"][0])
            / (peaks["labelled logits"][0] - before["labelled logits, before the step"][0]),
            "labelled_per_sample": setting.args.labelled,
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labelled", type=int, default=8, metavar="N", help="labelled positions per sample")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)


def _measure(setting: Setting, full: bool) -> dict[str, float]:
    """Gigabytes held before a step, and at its peak."""
    banks = random_banks(setting.size, BANKS)
    stack = BankStack(language_model(setting.size, setting.device), "merge")
    stack.set_frozen(banks[:-1])
    stack.add_trainable(setting.size.rank, setting.size.rank, initial=banks[-1])
    del banks
    stack.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stack.model.train()
    optimizer = torch.optim.AdamW([matrix for pair in stack.trainable().values() for matrix in pair], weight_decay=0)
    inputs: dict[str, Any] = random_batch(setting.size, setting.args.labelled, setting.device)
    if not full:
        keep, targets = loss_mask(inputs["labels"])
        inputs |= {"labels": targets, "shift_labels": targets, "logits_to_keep": keep}
    before = _start(setting.device)
    for _ in range(2):
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.size.dtype == "bfloat16"):
            loss = stack.model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if setting.device.type == "cuda":
        return {"before": before, "peak": torch.cuda.max_memory_allocated() / 1e9}
    return {"before": before, "peak": _resident("VmHWM")}


def _start(device: torch.device) -> float:
    """Forget the peak so far; gigabytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def _resident(field: str) -> float:
    """A line of Linux's account of this process, in gigabytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
