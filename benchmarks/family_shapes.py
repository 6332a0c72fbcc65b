"""Language models of other families at their published shapes, with random weights and a token of a tower.

The numbers are those of `text_config` in each repository's `config.json`. At another size than `7b`, a shape takes the
size's numbers and keeps what makes its family: biases, norms of heads, positions in parts, windows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from benchmarks.harness import Size

QWEN2_5 = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {**QWEN2_5, "vocab_size": 152064},
    "internvl": {**QWEN2_5, "vocab_size": 151674},
    "qwen3_vl": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "gemma3": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
    },
}
"""Qwen2.5-VL-7B, InternVL3-8B, Qwen3-VL-8B, and Gemma 3 4B, which is MedGemma 4B."""
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 14}
SMALL_TOWER = {**TOWER, "num_hidden_layers": 2, "image_size": 28}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}
TOKENS = {"image_token_id": 3, "video_token_id": 2, "vision_start_token_id": 1, "vision_end_token_id": 0}


def family_model(family: str, size: Size, published: bool, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Return a family's model, frozen.

    Args:
        family: A name of `PUBLISHED`.
        size: Its numbers are taken unless the published ones are; always its dtype.
        published: Whether to take the published shape.
        device: The device of its weights.
        seed: The seed of its weights.
    """
    torch.manual_seed(seed)
    text = PUBLISHED[family] if published else _of_size(size)
    config = _CONFIGS[family](text)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with device:
            model = cast(PreTrainedModel, AutoModelForImageTextToText.from_config(config))
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    return model.eval()


def family_batch(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of text with what the family's processor adds."""
    return batch | ({"token_type_ids": torch.zeros_like(batch["input_ids"])} if family == "gemma3" else {})


def _of_size(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocabulary,
    }


def _qwen(kind: Any, theta: float, sections: tuple[int, int, int], text: dict[str, Any]) -> Any:
    half = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) // 2
    parts = [half - 2 * (half * sections[1] // sum(sections)), *[half * sections[1] // sum(sections)] * 2]
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": parts}
    interleaved = {"mrope_interleaved": True} if kind is Qwen3VLConfig else {}
    tower = {**QWEN_TOWER, "out_hidden_size": text["hidden_size"]}
    tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16} if interleaved else {}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return kind(text_config={**text, **ends, "rope_parameters": {**rope, **interleaved}}, vision_config=tower, **TOKENS)


def _internvl(text: dict[str, Any]) -> Any:
    tower = {**SMALL_TOWER, "image_size": [28, 28], "patch_size": [14, 14]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return InternVLConfig(
        text_config={"model_type": "qwen2", **text, **rope, "tie_word_embeddings": False},
        vision_config=tower,
        image_token_id=3,
        image_seq_length=1,
        tie_word_embeddings=False,
    )


def _gemma3(text: dict[str, Any]) -> Any:
    return Gemma3Config(
        text_config=text, vision_config=SMALL_TOWER, mm_tokens_per_image=1, image_token_index=3, boi_token_index=1
    )


_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen2_5_vl": partial(_qwen, Qwen2_5_VLConfig, 1e6, (16, 24, 24)),
    "qwen3_vl": partial(_qwen, Qwen3VLConfig, 5e6, (24, 20, 20)),
    "internvl": _internvl,
    "gemma3": _gemma3,
}
