"""The language model inside an image-text model, the layers in it that banks adapt, and the projector before it, found
in the model itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import nn
from transformers import PreTrainedModel

from mslora_cr.models.layout import LANGUAGE_LINEARS

if TYPE_CHECKING:  # PEFT takes seconds to import, and banks that are merged do not need it.
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

PROJECTOR = "multi_modal_projector"
"""The attribute of the projector between tower and language model, and its name in PEFT's `modules_to_save`."""
_INNER = ("language_model", "text_model", "model", "decoder")
"""Attributes under which models keep an inner model."""
_NUMBERED = re.compile(r"(.+\.layers)\.(\d+)\.(.+)")


def base_of(model: PreTrainedModel | PeftModel) -> Any:
    """Return the base model, out of PEFT's if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_adapted(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Return whether a module is PEFT's layer around a linear one."""
    return hasattr(module, "lora_A")


def language_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the decoder that reads text and images, without the vision tower, the projector and `lm_head`."""
    module = base_of(model).get_decoder()
    while not hasattr(module, "layers"):
        inner = next((getattr(module, name) for name in _INNER if hasattr(module, name)), None)
        if inner is None:
            break
        module = inner
    return cast(PreTrainedModel, module)


def projector_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the projector of a base model; None if it has no module of LLaVA's name."""
    return dict(model.get_submodule("model").named_children()).get(PROJECTOR)


def beside_language(model: PreTrainedModel) -> list[str]:
    """Return the modules beside the language model, by name: tower, projector, `lm_head`."""
    [prefix] = [name for name, module in model.named_modules() if module is language_model(model)]
    path = prefix.split(".")
    owners = [".".join(path[:depth]) for depth in range(len(path))]
    return [
        f"{owner}.{name}".lstrip(".")
        for owner, inside in zip(owners, path, strict=True)
        for name, _ in model.get_submodule(owner).named_children()
        if name != inside
    ]


def language_linears(model: PreTrainedModel | PeftModel) -> dict[str, nn.Linear]:
    """Return the linear layers that banks adapt, by their name in transformers' model, with or without PEFT around
    them.

    These are all linear layers of the language model's decoder layers, except those that choose among experts
    (`routes`) and those that PEFT renames (`renamed_by_peft`).
    """
    base, language = base_of(model), language_model(model)
    [prefix] = [name for name, module in base.named_modules() if module is language]
    renamed, linears, adapted = renamed_by_peft(base), {}, ""
    for name, module in language.named_modules(prefix=prefix):
        if adapted and name.startswith(adapted):  # PEFT added it to the layer.
            continue
        adapted = f"{name}." if is_adapted(module) else ""
        linear = cast(Any, module).get_base_layer() if adapted else module
        left_out = name.rpartition(".")[2] in renamed or _routes(base, name)
        if isinstance(linear, nn.Linear) and _NUMBERED.fullmatch(name) and not left_out:
            linears[name] = linear
    return linears


def _routes(model: nn.Module, name: str) -> bool:
    """Return whether a layer chooses among a mixture's experts, or weighs them: `gate`, `router`, `shared_expert_gate`,
    …
    """
    owner, _, leaf = name.rpartition(".")
    beside = dict(model.get_submodule(owner).named_children())
    return "experts" in beside and leaf in ("gate", "router", "shared_expert_gate", "shared_experts_gate")


def renamed_by_peft(model: PreTrainedModel) -> frozenset[str]:
    """Return endings of layers that PEFT mistakes for experts which transformers 5 fuses into one parameter, so that it
    would adapt the experts instead; empty for most models.
    """
    if not fused_experts(model):
        return frozenset()
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(getattr(model, "config", None), "model_type", ""))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(kind, ())) if kind else frozenset()


def fused_experts(model: PreTrainedModel) -> list[str]:
    """Return parameters that hold all experts of a layer, by name; banks do not adapt them."""
    named = language_model(model).named_parameters()
    return [name for name, parameter in named if parameter.dim() == 3 and "experts" in name]


def linears_pattern(names: Iterable[str]) -> str:
    """Return a full-match pattern of these layers and of no other layer of their models, for PEFT.

    Args:
        names: Names as in `language_linears`.
    """
    parts = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    parents = sorted({match[1].removeprefix("model.") for match in parts})
    kinds = sorted({match[3] for match in parts})
    pattern = rf".*({'|'.join(map(re.escape, parents))})\.\d+\.({'|'.join(map(re.escape, kinds))})"
    plain = re.compile(LANGUAGE_LINEARS)
    return LANGUAGE_LINEARS if parts and all(plain.fullmatch(match[0]) for match in parts) else pattern


def adapter_targets(model: PreTrainedModel, names: Iterable[str]) -> str | list[str]:
    """Return PEFT's `target_modules` for exactly these layers: a pattern, or their names if PEFT would rewrite a
    pattern.

    Args:
        names: Names as in `language_linears`.
    """
    return sorted(names) if renamed_by_peft(model) else linears_pattern(names)


def layer_types(model: PreTrainedModel) -> set[str]:
    """Return the kinds of the language model's layers, from its configuration."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])


def caches_keys_alone(model: PreTrainedModel) -> bool:
    """Return whether every layer caches only keys and values of text: no recurrent state, no cross attention."""
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    return layer_types(model) <= {"full_attention", "sliding_attention"} and not crossing


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the language model's decoder layers."""
    return list(language_model(model).get_submodule("layers").children())


def last_mlp(model: PreTrainedModel) -> nn.Module | None:
    """Return the MLP of the language model's last decoder layer, which treats each position alone; None if it is not a
    plain one of linear layers.
    """
    mlp = dict(decoder_layers(model)[-1].named_children()).get("mlp")
    if mlp is None:
        return None
    holding = [child for child in mlp.children() if any(True for _ in child.parameters())]
    return mlp if holding and all(isinstance(child, nn.Linear) or is_adapted(child) for child in holding) else None
