"""Checks whether a PEFT adapter is plain LoRA over an unchanged base model, and so can be a bank.

Only what is on a short list is accepted. An adapter's tensors do not show what it does: their meaning depends on
`adapter_config.json`, and every release of PEFT adds keys to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mslora_cr.banks.bank import BankError
from mslora_cr.models.language import PROJECTOR

if TYPE_CHECKING:
    from peft import LoraConfig

WRITTEN = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern"),
)
"""The keys that PEFT 0.5 knows. Every later release reads a configuration of these keys; keys that are left out have
their defaults."""
_FREE = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Keys whose values do not change the meaning of the tensors. The layers that they name are compared with the
tensors."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": ([PROJECTOR],),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
"""Values of other keys at which LoRA is plain, besides empty ones (null, false, "", [], {})."""
_BESIDE = ("non_lora_trainables.bin", "mm_projector.bin", "trainable_token_indices.safetensors")
"""Files of other training scripts with weights that were trained beside the LoRA."""


def check_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    """Check an adapter's folder.

    Raises:
        BankError: By `adapter_config.json` this is not plain LoRA over an unchanged base, or an unknown key has a value
            that is not empty; or weights were trained that are not read here.
    """
    for key, value in sorted(config.items()):
        if key in _FREE:
            continue
        if key in ("peft_type", "init_lora_weights"):
            plain = any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in _PLAIN[key])
        else:
            plain = not value or value in _PLAIN.get(key, ())
        if not plain:
            raise BankError(
                f"{folder}: a bank is plain LoRA over the unchanged base model (`alpha / r · B A`), but the adapter's "
                f"configuration says {key}: {str(value)[:60]!r}, which only PEFT itself can honour"
            )
    for name in _BESIDE:
        if (folder / name).exists():
            raise BankError(
                f"{folder}: {name} holds weights that were trained beside the LoRA matrices; a bank cannot store them"
            )


def check_targets(folder: Path, config: Mapping[str, Any], modules: Iterable[tuple[str, str]]) -> None:
    """Refuse matrices of layers that the configuration does not name, since PEFT would leave them out.

    Args:
        modules: The layers that have matrices, by their names in the file and in the model.
    """
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    modules = list(modules)
    try:
        if _all_named(config, keys, modules):
            return
        from peft import LoraConfig

        named = LoraConfig(**{key: config[key] for key in keys if config.get(key)})
        for stored, module in modules:
            if named.target_modules and not any(_named(named, name) for name in (stored, module)):
                raise BankError(
                    f"{folder}: there are matrices of {stored}, which the adapter's configuration does not name "
                    "(target_modules, exclude_modules, layers_to_transform)"
                )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{folder}: the adapter's configuration names no layers ({error})") from None


def _all_named(config: Mapping[str, Any], keys: Sequence[str], modules: Sequence[tuple[str, str]]) -> bool:
    """Return whether a pattern alone names all layers, as PEFT would read it; this does without importing PEFT."""
    pattern = config.get("target_modules")
    if not isinstance(pattern, str) or any(config.get(key) for key in keys[1:]):
        return False
    return all(any(re.fullmatch(pattern, name) for name in names) for names in modules)


def _named(config: LoraConfig, name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return config.target_modules == "all-linear" or bool(check_target_module_exists(config, name))
