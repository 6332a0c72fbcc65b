"""The published checkpoint of a bank, `cl_lora.bin` with `config.json`: read and written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError, assemble_bank, check_shape
from mslora_cr.models.layout import linear_name, published_linear_name
from mslora_cr.utils.files import replace_folder

PUBLISHED_WEIGHTS = "cl_lora.bin"
_PUBLISHED_KEY = re.compile(r"(model\.layers\.\d+\.\w+\.\w+)\.cl_lora_pool\.task_(\d+)_lora\.lora_([AB])")


def load_published(folder: Path) -> Bank:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = config["mslora_cfg"]
        rank, alpha = check_shape(settings["lora_rank"], settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BankError(f"{folder}/config.json: lora_rank and lora_alpha not found in mslora_cfg ({error!r})") from None
    try:
        stored = torch.load(folder / PUBLISHED_WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BankError(f"{folder / PUBLISHED_WEIGHTS}: not plain tensors, so it is not opened ({error})") from None
    if not isinstance(stored, dict):
        raise BankError(
            f"{folder / PUBLISHED_WEIGHTS}: expected a dictionary of tensors, found {type(stored).__name__}"
        )
    return published_bank(folder / PUBLISHED_WEIGHTS, folder.name, rank, alpha, stored)


def published_bank(place: Path, name: str, rank: int, alpha: float, stored: Mapping[Any, Any]) -> Bank:
    """A bank from tensors under the published keys; `place` is named in errors.

    Raises:
        BankError: a key or tensor is not of a published bank, or there are several banks.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    tasks = set()
    for key, tensor in stored.items():
        match = _PUBLISHED_KEY.fullmatch(str(key))
        module = linear_name(match[1]) if match else None
        if match is None or module is None or not isinstance(tensor, Tensor):
            raise BankError(f"{place}: {key} is not a matrix of a published bank")
        halves.setdefault(module, {})[match[3]] = tensor
        tasks.add(int(match[2]))
    if len(tasks) > 1:
        raise BankError(f"{place}: holds the banks of {len(tasks)} tasks, {sorted(tasks)}; a file of one is needed")
    return assemble_bank(place, name, rank, alpha, halves, {})


def export_published(bank: Bank, folder: Path, index: int, base_config: Mapping[str, Any]) -> None:
    """Write a bank as the published code does: `cl_lora.bin` and `config.json`.

    Args:
        index: the task's position in the stream, from 0; it is part of every key.
        base_config: the base model's `config.json`, to which `mslora_cfg` is added.

    Raises:
        BankError: the bank has routers, for which the published format has no place.
    """
    if bank.routers:
        raise BankError(f"bank {bank.name!r} is a mixture of experts, which the published format cannot represent")
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {}
    for module, pair in bank.matrices.items():
        for letter, tensor in zip("AB", pair, strict=True):
            key = f"{published_linear_name(module)}.cl_lora_pool.task_{index}_lora.lora_{letter}"
            tensors[key] = tensor.clone()
    torch.save(tensors, staging / PUBLISHED_WEIGHTS)
    settings = {"max_task": index + 1, "lora_rank": bank.rank, "lora_alpha": bank.alpha, "lora_dropout": 0.0}
    config = {**base_config, "max_task": index + 1, "mslora_cfg": settings}
    (staging / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    replace_folder(staging, folder)
