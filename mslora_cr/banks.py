"""A bank on disk and in memory: save, load; the published `cl_lora.bin` in and out.

A bank is one PEFT LoRA adapter over every linear layer of the language model.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mslora_cr.errors import UserError
from mslora_cr.files import replace_folder
from mslora_cr.llava_med import LANGUAGE_LINEARS, linear_name, published_linear_name

WEIGHTS, CONFIG, METADATA = "adapter_model.safetensors", "adapter_config.json", "bank.json"
MEMORY = "memory.safetensors"
"""What a method keeps of a task beside its bank."""
STATISTICS = "router.safetensors"
"""What tells the task's questions from those of others."""
PUBLISHED_WEIGHTS = "cl_lora.bin"
ROUTER = "lora_router.weight"
PEFT_PREFIX = "base_model.model."
_PUBLISHED_KEY = re.compile(r"(model\.layers\.\d+\.\w+\.\w+)\.cl_lora_pool\.task_(\d+)_lora\.lora_([AB])")

Matrices = dict[str, tuple[Tensor, Tensor]]
"""Linear layer's name in transformers' model → (A of shape (rank, in), B of shape (out, rank))."""


class BankError(UserError):
    """A bank cannot be read, or does not fit the model or the other banks."""


@dataclass(frozen=True)
class Bank:
    """A task's LoRA: float32 matrices on the CPU. Adds ``alpha / rank · B A`` to each linear layer's weight.

    With routers it is a mixture of experts, equal slices of the rank: ``alpha / rank · B (g(x) ⊙ A x)``, each slice
    times its expert's share in ``g(x) = softmax(router x)``. That depends on the input, so it cannot be folded.
    """

    name: str
    rank: int
    alpha: float
    matrices: Matrices
    metadata: dict[str, Any] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)
    """By linear layer, (experts, in); empty for plain LoRA."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def tensors(self) -> list[Tensor]:
        """All its numbers."""
        return [*(matrix for pair in self.matrices.values() for matrix in pair), *self.routers.values()]

    @property
    def experts(self) -> int:
        return next((len(router) for router in self.routers.values()), 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its layers' names and its numbers."""
        digest = hashlib.sha256()
        for name in self.matrices:
            digest.update(name.encode())
        for tensor in self.tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


# --- on disk -------------------------------------------------------------------------------------------------------


def save_bank(
    bank: Bank, folder: Path, dropout: float = 0.0, beside: Mapping[str, Mapping[str, Tensor]] | None = None
) -> str:
    """Write a bank as a PEFT adapter with `bank.json` beside it, and return the SHA-256 of its weights.

    The folder appears whole or not at all: it is written under a temporary name and renamed.

    Args:
        beside: what else is kept of the task, by the name of its safetensors file; empty ones are not written.

    Raises:
        BankError: some of its numbers are not finite; nothing is written then.
    """
    tensors = {}
    for name, (a, b) in bank.matrices.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    for name, router in bank.routers.items():
        tensors[f"{PEFT_PREFIX}{name}.{ROUTER}"] = router.contiguous()
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise BankError(
            f"bank {bank.name!r} is not saved: {len(broken)} of its {len(tensors)} matrices hold NaN or infinite "
            f"numbers, first {broken[0].removeprefix(PEFT_PREFIX)}. A lower learning rate or lower penalty weights "
            "usually help"
        )
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    lora_config(bank.rank, bank.alpha, dropout).save_pretrained(str(staging))
    save_file(tensors, staging / WEIGHTS, {"format": "pt"})
    for name, kept in (beside or {}).items():
        if kept:
            save_file(dict(kept), staging / name)
    digest = file_digest(staging / WEIGHTS)
    described = {**bank.metadata, "name": bank.name, "rank": bank.rank, "alpha": bank.alpha, "sha256": digest}
    (staging / METADATA).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    replace_folder(staging, folder)
    return digest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_bank(path: Path) -> Bank:
    """Read a bank: a PEFT adapter's folder, a published checkpoint's folder, or its `cl_lora.bin` itself.

    Raises:
        BankError: nothing readable was found, or it is not a bank over the language model's linear layers.
    """
    if path.name == PUBLISHED_WEIGHTS or (path / PUBLISHED_WEIGHTS).is_file():
        return _load_published(path.parent if path.name == PUBLISHED_WEIGHTS else path)
    try:
        config = _read_object(path / CONFIG)
        rank, alpha = _shape(config["r"], config["lora_alpha"])
        tensors = load_file(path / WEIGHTS)
        metadata = _read_object(path / METADATA) if (path / METADATA).is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BankError(
            f"{path}: no bank; expected {CONFIG} and {WEIGHTS}, or {PUBLISHED_WEIGHTS} ({error!r})"
        ) from None
    if config.get("use_rslora") or config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise BankError(f"{path}: only plain LoRA of one rank is a bank (no rsLoRA, DoRA or patterns)")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.lora_(A|B|router)\.weight", key)
        if match is None:
            raise BankError(f"{path}/{WEIGHTS}: {key} is not a LoRA matrix")
        halves.setdefault(match[1], {})[match[2]] = tensor
    return _bank(path, metadata.get("name", path.name), rank, alpha, halves, metadata)


def _shape(rank: Any, alpha: Any) -> tuple[int, float]:
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"rank {rank!r} and alpha {alpha!r} are not those of a bank")
    return rank, float(alpha)


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not an object")
    return content


def _load_published(folder: Path) -> Bank:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = config["mslora_cfg"]
        rank, alpha = _shape(settings["lora_rank"], settings["lora_alpha"])
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
    return _bank(place, name, rank, alpha, halves, {})


def _bank(
    path: Path,
    name: str,
    rank: int,
    alpha: float,
    halves: Mapping[str, Mapping[str, Tensor]],
    metadata: dict[str, Any],
) -> Bank:
    matrices: Matrices = {}
    routers = {}
    for module, pair in sorted(halves.items(), key=lambda item: _natural(item[0])):
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise BankError(f"{path}: {module} has no pair of matrices of rank {rank}")
        matrices[module] = (a.float(), b.float())
        router = pair.get("router")
        if router is not None:
            if router.dim() != 2 or router.shape[1] != a.shape[1] or rank % router.shape[0]:
                raise BankError(f"{path}: {module} has no router of experts that share rank {rank} equally")
            routers[module] = router.float()
    if not matrices:
        raise BankError(f"{path}: the bank is empty")
    if routers.keys() - matrices.keys() or (routers and len(routers) < len(matrices)):
        raise BankError(f"{path}: some of its layers have a router, and some have none")
    return Bank(name, rank, float(alpha), matrices, metadata, routers)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


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


# --- its mathematics -----------------------------------------------------------------------------------------------


def lora_config(rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig:
    """PEFT's configuration of a bank: every linear layer of the language model, nothing else."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LANGUAGE_LINEARS, bias="none")


def concatenated(name: str, banks: Iterable[Bank]) -> tuple[Tensor, Tensor]:
    """Scaled A matrices on top of each other, B matrices side by side: B A is the sum of the banks' updates."""
    pairs = [(bank.scaling * bank.matrices[name][0], bank.matrices[name][1]) for bank in banks]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
