"""Saves a bank as a PEFT LoRA adapter and loads it, or a published `cl_lora.bin` (`published.py`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError, assemble_bank, check_shape
from mslora_cr.banks.plain_lora import WRITTEN, check_plain_lora, check_targets
from mslora_cr.banks.published import PUBLISHED_WEIGHTS, load_published
from mslora_cr.config.run_files import BANK_WEIGHTS
from mslora_cr.models.language import PROJECTOR, linears_pattern
from mslora_cr.models.layout import linear_name
from mslora_cr.utils.files import file_digest, replacing_folder, write_json, write_text
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import read_object
from mslora_cr.utils.visible import visible

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, METADATA = "adapter_config.json", "bank.json"
TASK_STATE = "memory.safetensors"
"""A method's task state, beside the bank."""
STATISTICS = "router.safetensors"
"""The router's statistics of the task's questions."""
ROUTER = "lora_router.weight"
PEFT_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B|router)(?:\.default)?\.weight")
_PROJECTOR_KEY = re.compile(rf"(?:base_model\.model\.)?(?:model\.)?{PROJECTOR}\.(.+)")


def save_bank(
    bank: Bank, folder: Path, dropout: float = 0.0, beside: Mapping[str, Mapping[str, Tensor]] | None = None
) -> str:
    """Write a bank as a PEFT adapter with `bank.json` beside it, and return the SHA-256 of its weights.

    The folder appears whole or not at all: it is written under a temporary name and renamed.

    Args:
        dropout: The dropout with which it was trained.
        beside: Further tensors to store, by the name of their safetensors file; empty ones are not written.

    Raises:
        BankError: Some of its numbers are not finite; nothing is written then.
    """
    tensors = _named(bank)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise BankError(
            f"bank {bank.name!r} is not saved: {len(broken)} of its {len(tensors)} matrices hold NaN or infinite "
            f"numbers, first {broken[0].removeprefix(PEFT_PREFIX)}. A lower learning rate or lower penalty weights "
            "usually help"
        )
    with replacing_folder(folder) as staging:
        write_adapter(bank, staging, dropout)
        for name, beside_tensors in (beside or {}).items():
            if beside_tensors:
                save_file(dict(beside_tensors), staging / name)
        digest = file_digest(staging / BANK_WEIGHTS)
        described = {**bank.metadata, "name": bank.name, "rank": bank.rank, "alpha": bank.alpha, "sha256": digest}
        write_json(staging / METADATA, described)
    return digest


def write_adapter(bank: Bank, folder: Path, dropout: float = 0.0, changed: Mapping[str, Any] | None = None) -> None:
    """Write a bank's weights and settings into an existing folder, as PEFT reads them.

    Args:
        folder: An existing folder.
        changed: Settings that replace those of a bank, or add to them.
    """
    settings = lora_config(bank.matrices, bank.rank, bank.alpha, dropout).to_dict()
    # Keys that hold a default and are younger than PEFT 0.5 are left out.
    settings = {**{key: settings[key] for key in sorted(WRITTEN)}, "peft_type": "LORA", **(changed or {})}
    if bank.projector:
        settings["modules_to_save"] = [PROJECTOR]
    # Non-ASCII text is escaped, as PEFT does it: a base model's path may be in any script.
    write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
    save_file(_named(bank), folder / BANK_WEIGHTS, {"format": "pt"})


def _named(bank: Bank) -> dict[str, Tensor]:
    """Return a bank's numbers under PEFT's names."""
    tensors = {}
    for name, (a, b) in bank.matrices.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    for name, router in bank.routers.items():
        tensors[f"{PEFT_PREFIX}{name}.{ROUTER}"] = router.contiguous()
    for name, parameter in bank.projector.items():
        tensors[f"{PEFT_PREFIX}model.{PROJECTOR}.{name}"] = parameter.contiguous()
    return tensors


def load_bank(path: Path) -> Bank:
    """Read a bank: a PEFT adapter's folder, a published checkpoint's folder, or its `cl_lora.bin` itself.

    Raises:
        BankError: There is nothing readable, or it is not plain LoRA over the language model's linear layers, as this
            transformers, an older one or LLaVA names them, with or without a projector of `modules_to_save`.
    """
    if path.name == PUBLISHED_WEIGHTS or (path / PUBLISHED_WEIGHTS).is_file():
        return load_published(path.parent if path.name == PUBLISHED_WEIGHTS else path)
    try:
        config = read_object(path / CONFIG)
        rank, alpha = check_shape(config["r"], config["lora_alpha"])
        tensors = load_file(check_regular(path / BANK_WEIGHTS))
        metadata = read_object(path / METADATA) if (path / METADATA).is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise BankError(
            f"{path}: no bank; expected {CONFIG} and {BANK_WEIGHTS}, or {PUBLISHED_WEIGHTS} ({error!r})"
        ) from None
    check_plain_lora(path, config)
    halves: dict[str, dict[str, Tensor]] = {}
    layers, projector = {}, {}
    for key, tensor in tensors.items():
        if config.get("modules_to_save") and (saved := _PROJECTOR_KEY.fullmatch(key)):
            projector[saved[1]] = tensor
            continue
        match = _KEY.fullmatch(key)
        module = linear_name(match[1], exact="base_model" in metadata) if match else None
        if match is None or module is None:
            raise BankError(
                f"{path}/{BANK_WEIGHTS}: {visible(key[:200])} is not a LoRA matrix of a linear layer of the language "
                "model"
            )
        if match[2] in halves.setdefault(module, {}):
            raise BankError(f"{path}/{BANK_WEIGHTS}: contains the matrices of {module} twice, under different names")
        halves[module][match[2]] = tensor
        layers[match[1]] = module
    check_targets(path, config, layers.items())
    if config.get("modules_to_save") and not projector:
        raise BankError(f"{path}: {CONFIG} says that the projector was trained, but {BANK_WEIGHTS} does not hold it")
    name = metadata.get("name")
    return assemble_bank(path, name if isinstance(name, str) else path.name, rank, alpha, halves, metadata, projector)


def bank_size(folder: Path) -> int:
    """Return the number of parameters of a saved bank, from its file's header."""
    with safe_open(folder / BANK_WEIGHTS, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def lora_config(layers: Iterable[str], rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig:
    """Return PEFT's configuration of a bank over exactly these linear layers of the language model."""
    targets = linears_pattern(layers)
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
