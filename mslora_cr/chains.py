"""The banks of a whole stream as folders: published runs (`<run>/<a_b_c>/cl_lora.bin`) in and out, or a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mslora_cr.banks import PUBLISHED_WEIGHTS, WEIGHTS, Bank, BankError, export_published, load_bank
from mslora_cr.config import StreamConfig, Task
from mslora_cr.methods import METHODS

_SPELLINGS = ("finetune_lora_MSLoRA", "finetune_MSLoRA")


def load_chain(folder: Path, config: StreamConfig) -> dict[str, Bank]:
    """The banks of the configuration's tasks, by task, from a folder that holds them.

    The folder is a published run, a folder of published runs (either spelling of the run's name), or a run folder of
    this project. The chain may end before the stream does.

    Raises:
        BankError: there is no bank, a bank is missing while a later one is there, or one is of another rank or alpha.
    """
    places = {task.name: _place(folder, config, task) for task in config.stream}
    found = [task.name for task in config.stream if places[task.name] is not None]
    if not found:
        tried = _published_name(config, config.stream[0])
        raise BankError(f"{folder}: no bank of this stream; looked for {tried}/{PUBLISHED_WEIGHTS} and banks/NAME")
    banks: dict[str, Bank] = {}
    for task in config.stream:
        place = places[task.name]
        if place is None:
            if METHODS[config.method].folds_earlier and len(banks) < len(found):
                raise BankError(
                    f"{folder}: the chain has a hole: {_published_name(config, task)} is missing, though "
                    f"{_published_name(config, config.task(found[-1]))} is there"
                )
            continue
        bank = load_bank(place)
        if (bank.rank, bank.alpha) != (config.lora.rank, config.lora.alpha):
            raise BankError(
                f"{place}: rank {bank.rank} and alpha {bank.alpha:g}, but the configuration says rank "
                f"{config.lora.rank} and alpha {config.lora.alpha:g}; set lora.rank and lora.alpha"
            )
        banks[task.name] = replace(bank, name=task.name)
    return banks


def _published_name(config: StreamConfig, task: Task) -> str:
    """A task's folder in a published run: the names of the tasks learned by then, or its own if banks stand alone."""
    method = METHODS[config.method]
    chain = config.stream[: task.index + 1] if method.folds_earlier or method.continues else [task]
    return "_".join(member.name for member in chain)


def _place(folder: Path, config: StreamConfig, task: Task) -> Path | None:
    roots = [folder, folder / config.run]
    for ours, theirs in (_SPELLINGS, _SPELLINGS[::-1]):
        if config.run.startswith(ours):
            roots.append(folder / config.run.replace(ours, theirs, 1))
    for root in roots:
        if (root / _published_name(config, task) / PUBLISHED_WEIGHTS).is_file():
            return root / _published_name(config, task)
        if (root / "banks" / task.name / WEIGHTS).is_file():
            return root / "banks" / task.name
    return None


def export_chain(banks: Mapping[str, Bank], config: StreamConfig, output: Path) -> Iterator[Path]:
    """Write banks as a published run below `output`; gives each folder when it is there."""
    base = json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8"))
    for task in config.stream:
        if task.name in banks:
            folder = output / config.run / _published_name(config, task)
            export_published(banks[task.name], folder, task.index, base)
            yield folder


def describe(bank: Bank) -> dict[str, Any]:
    """What a bank is, for people: rank, layers, parameters, and the norm of its update ``alpha / rank · B A``."""
    norms = {name: bank.scaling * _product_norm(a.double(), b.double()) for name, (a, b) in bank.matrices.items()}
    largest = max(norms, key=lambda name: norms[name])
    return {
        "name": bank.name,
        "rank": bank.rank,
        "alpha": bank.alpha,
        "experts": bank.experts,
        "linear_layers": len(bank.matrices),
        "parameters": sum(matrix.numel() for matrix in bank.tensors),
        "update_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
        "largest_update": {"layer": largest, "norm": norms[largest]},
        "metadata": bank.metadata,
    }


def _product_norm(a: Tensor, b: Tensor) -> float:
    """``‖B A‖`` from matrices of the rank's size: ``‖B A‖² = tr(BᵀB AAᵀ)``."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
