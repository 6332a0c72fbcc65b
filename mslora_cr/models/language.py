"""The language model inside an image-text model, and what in it banks adapt: found in the model, not typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from mslora_cr.models.layout import LANGUAGE_LINEARS

_NUMBERED = re.compile(r"(.+\.layers)\.(\d+)\.(.+)")


def language_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The decoder that reads text and images: not the vision tower, nor what projects its features, nor `lm_head`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, base.get_decoder())


def language_linears(model: PreTrainedModel | PeftModel) -> dict[str, nn.Linear]:
    """The linear layers that banks adapt, by their name in transformers' model, with or without PEFT around them: all
    of the language model's decoder layers."""
    base, language = model.get_base_model() if isinstance(model, PeftModel) else model, language_model(model)
    [place] = [name for name, module in base.named_modules() if module is language]
    linears: dict[str, nn.Linear] = {}
    adapted = ""
    for name, module in language.named_modules(prefix=place):
        if adapted and name.startswith(adapted):  # what PEFT put into the layer
            continue
        adapted = f"{name}." if isinstance(module, LoraLayer) else ""
        linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if isinstance(linear, nn.Linear) and _NUMBERED.fullmatch(name):
            linears[name] = linear
    return linears


def linears_pattern(names: Iterable[str]) -> str:
    """A full-match pattern of these layers and of no other layer of their models, for PEFT.

    Args:
        names: as `language_linears` has them.
    """
    parts = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    places = sorted({match[1].removeprefix("model.") for match in parts})
    kinds = sorted({match[3] for match in parts})
    pattern = rf".*({'|'.join(map(re.escape, places))})\.\d+\.({'|'.join(map(re.escape, kinds))})"
    plain = re.compile(LANGUAGE_LINEARS)
    return LANGUAGE_LINEARS if parts and all(plain.fullmatch(match[0]) for match in parts) else pattern


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The language model's decoder layers."""
    return list(language_model(model).get_submodule("layers").children())


def last_mlp(model: PreTrainedModel) -> nn.Module | None:
    """The MLP of the language model's last decoder layer, in which positions do not meet; None where it is not a plain
    one, of linear layers alone."""
    mlp = dict(decoder_layers(model)[-1].named_children()).get("mlp")
    if mlp is None:
        return None
    holding = [child for child in mlp.children() if any(True for _ in child.parameters())]
    return mlp if holding and all(isinstance(child, nn.Linear | LoraLayer) for child in holding) else None
