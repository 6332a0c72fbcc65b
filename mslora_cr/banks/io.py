"""A bank on disk and in memory: save, load; the published `cl_lora.bin` in and out.

A bank is one PEFT LoRA adapter over every linear layer of the language model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError, assemble_bank, check_shape
from mslora_cr.banks.published import PUBLISHED_WEIGHTS, load_published
from mslora_cr.models.layout import LANGUAGE_LINEARS
from mslora_cr.utils.files import file_digest, replace_folder

WEIGHTS, CONFIG, METADATA = "adapter_model.safetensors", "adapter_config.json", "bank.json"
TASK_STATE = "memory.safetensors"
"""What a method keeps of a task beside its bank."""
STATISTICS = "router.safetensors"
"""What tells the task's questions from those of others."""
ROUTER = "lora_router.weight"
PEFT_PREFIX = "base_model.model."


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


def load_bank(path: Path) -> Bank:
    """Read a bank: a PEFT adapter's folder, a published checkpoint's folder, or its `cl_lora.bin` itself.

    Raises:
        BankError: nothing readable was found, or it is not a bank over the language model's linear layers.
    """
    if path.name == PUBLISHED_WEIGHTS or (path / PUBLISHED_WEIGHTS).is_file():
        return load_published(path.parent if path.name == PUBLISHED_WEIGHTS else path)
    try:
        config = _read_object(path / CONFIG)
        rank, alpha = check_shape(config["r"], config["lora_alpha"])
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
    return assemble_bank(path, metadata.get("name", path.name), rank, alpha, halves, metadata)


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not an object")
    return content


def lora_config(rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig:
    """PEFT's configuration of a bank: every linear layer of the language model, nothing else."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LANGUAGE_LINEARS, bias="none")
