"""Reads and writes the published checkpoint of a bank, `cl_lora.bin` with `config.json`."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError, assemble_bank, check_shape
from mslora_cr.models.layout import linear_name, published_linear_name
from mslora_cr.utils.files import replacing_folder, write_json
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import read_object
from mslora_cr.utils.visible import visible

PUBLISHED_WEIGHTS = "cl_lora.bin"
BASE_DIGEST = "base_model_digest"
_PUBLISHED_KEY = re.compile(r"(model\.layers\.[0-9]+\.\w+\.\w+)\.cl_lora_pool\.task_([0-9]{1,6})_lora\.lora_([AB])")


def load_published(folder: Path) -> Bank:
    try:
        settings = read_object(folder / "config.json")["mslora_cfg"]
        rank, alpha = check_shape(settings["lora_rank"], settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BankError(f"{folder}/config.json: lora_rank and lora_alpha not found in mslora_cfg ({error!r})") from None
    stored = load_tensors(folder / PUBLISHED_WEIGHTS)
    if not isinstance(stored, dict):
        raise BankError(
            f"{folder / PUBLISHED_WEIGHTS}: expected a dictionary of tensors, found {type(stored).__name__}"
        )
    return published_bank(folder / PUBLISHED_WEIGHTS, folder.name, rank, alpha, stored)


def load_tensors(path: Path) -> Any:
    """Read a file of `torch.save` that holds only tensors, containers and numbers; no code in it is run.

    Raises:
        BankError: The file is damaged, or contains more than that.
    """
    try:
        if zipfile.is_zipfile(check_regular(path)):
            with zipfile.ZipFile(path) as archive:  # torch does not compress; a member that expands is a bomb.
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its members are compressed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BankError(f"{path}: no such file") from None
    except OSError as error:
        raise BankError(f"{path}: cannot be read ({error.strerror or error})") from None
    # A damaged pickle may raise nearly anything, and torch's message advises unsafe loading.
    except Exception as error:
        raise BankError(
            f"{path}: not plain tensors, so it is not opened: it is damaged, or contains more than torch.save writes "
            f"for a dictionary of tensors ({type(error).__name__})"
        ) from None


def published_bank(path: Path, name: str, rank: int, alpha: float, stored: Mapping[Any, Any]) -> Bank:
    """Return a bank from tensors under the published keys.

    Args:
        path: The file, for messages.
        stored: The tensors by key.

    Raises:
        BankError: A key or tensor is not one of a published bank, or there are several banks.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    tasks = set()
    for key, tensor in stored.items():
        match = _PUBLISHED_KEY.fullmatch(str(key))
        module = linear_name(match[1]) if match else None
        if match is None or module is None or not isinstance(tensor, Tensor):
            raise BankError(f"{path}: {visible(str(key)[:200])} is not a matrix of a published bank")
        halves.setdefault(module, {})[match[3]] = tensor
        tasks.add(int(match[2]))
    if len(tasks) > 1:
        raise BankError(f"{path}: contains the banks of {len(tasks)} tasks, {sorted(tasks)}; give a file of one bank")
    return assemble_bank(path, name, rank, alpha, halves, {})


def export_published(
    bank: Bank, folder: Path, index: int, base_config: Mapping[str, Any], base_digest: str | None = None
) -> None:
    """Write a bank as the published code does: `cl_lora.bin` and `config.json`.

    Args:
        index: The task's position in the stream, from 0; it is part of every key.
        base_config: The base model's `config.json`, to which `mslora_cfg` is added.
        base_digest: The digest of the base model; an import on another base model is refused.

    Raises:
        BankError: The bank has routers or a projector, which the published format cannot represent.
    """
    if bank.projector:
        raise BankError(f"bank {bank.name!r} has a projector of its own, which the published format cannot represent")
    if bank.routers:
        raise BankError(f"bank {bank.name!r} is a mixture of experts, which the published format cannot represent")
    tensors = {}
    for module, pair in bank.matrices.items():
        for letter, tensor in zip("AB", pair, strict=True):
            key = f"{published_linear_name(module)}.cl_lora_pool.task_{index}_lora.lora_{letter}"
            tensors[key] = tensor.clone()
    settings = {"max_task": index + 1, "lora_rank": bank.rank, "lora_alpha": bank.alpha, "lora_dropout": 0.0}
    config = {**base_config, "max_task": index + 1, "mslora_cfg": settings}
    if base_digest:
        config[BASE_DIGEST] = base_digest
    with replacing_folder(folder) as staging:
        torch.save(tensors, staging / PUBLISHED_WEIGHTS)
        write_json(staging / "config.json", config)
