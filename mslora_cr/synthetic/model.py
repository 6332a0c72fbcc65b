"""Makes a tiny LLaVA-Med for the embedded stream, with LLaVA-Med v1.5's layout on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from mslora_cr.models.layout import save_llava_layout
from mslora_cr.models.llava_med import load
from mslora_cr.synthetic.pretraining import MAX_LENGTH, pretrain, pretraining_texts
from mslora_cr.synthetic.stream import all_texts, build_once

MODEL_FOLDER = "llava_med_tiny"
TOWER_FOLDER = "clip-tiny-patch14"


@dataclass(frozen=True)
class Shape:
    """The size of a model: fields of `CLIPVisionConfig` and `MistralConfig`, options of sentencepiece's trainer, and
    the folders of model and tower."""

    vision: dict[str, Any]
    text: dict[str, Any]
    tokenizer: dict[str, Any]
    model_folder: str
    tower_folder: str


_SELECT_LAYER = -2
_VISION: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = Shape(_VISION, _TEXT, {}, MODEL_FOLDER, TOWER_FOLDER)
SMALL = Shape(
    _VISION
    | {
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "image_size": 96,
        "patch_size": 16,
    },
    _TEXT | {"vocab_size": 1536},
    {"hard_vocab_limit": False},  # A stream of few words has fewer pieces.
    "llava_small",
    "clip-small-patch16",
)


def make_tiny_llava_med(directory: Path, seed: int = 0, pretrain_steps: int = 500, progress: bool = True) -> None:
    """Write ``directory/llava_med_tiny`` and, next to it, the CLIP tower that its configuration names.

    The weights are random at first; then `pretraining.pretrain` trains each half for ``pretrain_steps`` batches. With
    0 they stay random. A complete model made with the same arguments is left unchanged; one made with others is
    replaced.

    Raises:
        DataError: ``directory`` holds something else.
        ValueError: ``pretrain_steps`` is negative.
    """
    if pretrain_steps < 0:
        raise ValueError(f"pretrain_steps must not be negative, not {pretrain_steps}")

    def build(folder: Path) -> None:
        write_random_model(TINY, [*all_texts(), *pretraining_texts()], seed, folder)
        if pretrain_steps:
            base = load(folder / MODEL_FOLDER, dtype=torch.float32)
            pretrain(base, seed, pretrain_steps, progress)
            write_weights(TINY, base.model, folder)

    build_once(directory, "tiny LLaVA-Med", {"seed": seed, "pretrain_steps": pretrain_steps}, build)


def write_random_model(shape: Shape, texts: Iterable[str], seed: int, folder: Path) -> None:
    """Write a model with random weights, its tower, and a tokenizer trained on these texts."""
    _write_tokenizer(shape, texts, folder / shape.model_folder)
    write_weights(shape, _random_model(shape, seed), folder)


def _write_tokenizer(shape: Shape, texts: Iterable[str], folder: Path) -> None:
    """Train a small sentencepiece model with Llama's conventions: byte fallback, ids 0 <unk>, 1 <s>, 2 </s>, 3..
    bytes."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"[INST] \n{text} [/INST] {text} " for text in texts]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=shape.text["vocab_size"],
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **shape.tokenizer,
    )
    (folder / "tokenizer.vocab").unlink()
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": t, **flags, "special": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))}
    _write_json(folder / "special_tokens_map.json", {name: {"content": t, **flags} for name, t in tokens.items()})
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    _write_json(folder / "tokenizer_config.json", settings | tokens)


def _random_model(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights. Word vectors and head, which pretraining does not touch, get rows of about
    length 1."""
    config = LlavaConfig(
        text_config=MistralConfig(**shape.text, pad_token_id=0),
        vision_config=CLIPVisionConfig(**shape.vision),
        image_token_id=3,  # <0x00>
        vision_feature_layer=_SELECT_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for vocabulary in (model.get_input_embeddings(), model.get_output_embeddings()):
            nn.init.normal_(vocabulary.weight, std=shape.text["hidden_size"] ** -0.5)
    return model


def write_weights(shape: Shape, model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a model of this shape in bfloat16 in LLaVA-Med's layout, and its tower in float32 beside it."""
    _write_tower(shape, model, folder / shape.tower_folder)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_llava_layout(state, _llava_config(shape), folder / shape.model_folder)


def _llava_config(shape: Shape) -> dict[str, Any]:
    return {
        **shape.text,
        "architectures": ["LlavaMistralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "mm_hidden_size": shape.vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": _SELECT_LAYER,
        "mm_vision_tower": f"../{shape.tower_folder}",
        "model_type": "llava_mistral",
        "tokenizer_model_max_length": MAX_LENGTH,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
        "use_cache": True,
        "use_mm_proj": True,
    }


def _write_tower(shape: Shape, model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save the tower as CLIP stores it, in float32, with its preprocessing."""
    folder.mkdir(exist_ok=True)
    state = model.model.vision_tower.state_dict()
    tensors = {f"vision_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    _write_json(folder / "config.json", config | shape.vision | {"layer_norm_eps": 1e-5, "attention_dropout": 0.0})
    side = shape.vision["image_size"]
    preprocessing = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    _write_json(folder / "preprocessor_config.json", preprocessing)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
