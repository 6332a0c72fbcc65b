"""The shapes of a base model's layers, from its configuration alone."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPVisionConfig, LlavaConfig

from mslora_cr.models.family import family_of
from mslora_cr.models.language import language_linears
from mslora_cr.models.layout import llava_config, read_config
from mslora_cr.models.processor_base import empty_model_of


def language_linear_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer that a bank adapts, by its name, from the configuration alone.

    Raises:
        ModelError: The folder holds no base model.
    """
    config = read_config(path)
    if family_of(path).own_template:
        linears = language_linears(empty_model_of(path))
        return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    if config["model_type"] == "llava":
        text = LlavaConfig.from_pretrained(path).text_config
    else:
        text = llava_config(config, CLIPVisionConfig()).text_config
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
