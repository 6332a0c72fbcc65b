"""The shapes of a base model's layers, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlavaConfig

from mslora_cr.models.family import family_of
from mslora_cr.models.language import PROJECTOR, language_linears, projector_of
from mslora_cr.models.layout import ModelError, llava_config, read_config
from mslora_cr.models.processor_base import empty_model_of


def language_linear_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer that a bank adapts, by its name, from the configuration alone.

    Raises:
        ModelError: The folder holds no base model.
    """
    config = read_config(path)
    if family_of(path).own_template:
        linears = language_linears(empty_model_of(path))
        return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    text = _text_config(path, config)
    width, inner, head = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in layer.items()}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {
        f"model.language_model.layers.{number}.{name}": shape
        for number in range(text.num_hidden_layers)
        for name, shape in shapes.items()
    }


def projector_size(path: Path) -> int:
    """Return the number of parameters of a base model's projector, from the configuration alone.

    Args:
        path: The base model's folder.

    Raises:
        ModelError: The folder holds no base model, or one without a projector of LLaVA's name.
    """
    config = read_config(path)
    if not family_of(path).own_template:
        tower = config["vision_config"]["hidden_size"] if config["model_type"] == "llava" else config["mm_hidden_size"]
        width = _text_config(path, config).hidden_size
        return (tower + 1 + width + 1) * width
    projector = projector_of(empty_model_of(path))
    if projector is None:
        raise ModelError(
            f"{path}: the model has no {PROJECTOR}, so banks cannot train it; remove lora.projector_learning_rate"
        )
    return sum(parameter.numel() for parameter in projector.parameters())


def _text_config(path: Path, config: Mapping[str, Any]) -> Any:
    """Return the language model's configuration of a LLaVA of either layout."""
    if config["model_type"] == "llava":
        return LlavaConfig.from_pretrained(path).text_config
    return llava_config(config, CLIPVisionConfig()).text_config
