"""Loads LLaVA-Med as transformers' `LlavaForConditionalGeneration`; `layout.py` maps the names.

LLaVA-Med v1.5 is stored as `model_type: llava_mistral`, which transformers does not know. The weights map one to one
onto transformers' LLaVA (Mistral text model, CLIP tower, two-layer GELU projector), so no model code is needed here.
The shards contain a vision tower of their own; the published code ignores it and loads the one that `mm_vision_tower`
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

from mslora_cr.data.features import FeatureCache
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.tokenizer import Tokenizer, TokenizerError
from mslora_cr.models.layout import (
    PLACEHOLDER_PIECE,
    ModelError,
    check_report,
    from_pretrained,
    llava_config,
    read_config,
    shard_tensors,
)
from mslora_cr.models.vision import TowerEncoder, TowerFeatures, detach_tower, load_tower, tower_config, tower_source
from mslora_cr.utils.lean_imports import import_bitsandbytes, without_compiler

UNQUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""Parts that keep their dtype beside a language model in 4 or 8 bits: they take little memory and need precision."""


@dataclass
class LlavaMed:
    """A loaded base model with everything that prepares its inputs."""

    model: LlavaForConditionalGeneration
    tokenizer: Tokenizer
    image_processor: Any
    image_token_id: int
    """The id that represents one image patch."""
    patches: int
    """The number of image patches, hence of positions, per image."""

    @cached_property
    def image_encoder(self) -> TowerEncoder:
        return TowerEncoder(self.model.model.vision_tower, self.model.config.vision_feature_layer)

    def input_processor(
        self, max_length: int, all_images: bool, features: FeatureCache | None = None
    ) -> LlavaMedInputs:
        return LlavaMedInputs(
            self.tokenizer, self.image_processor, self.image_token_id, self.patches, max_length, all_images, features
        )

    def given_features(self, projector_changes: bool = False) -> TowerFeatures:
        """Take the tower out of the model; see `base_model.BaseModel`. Its features come before the projector."""
        tower = detach_tower(self.model).to("cpu")
        return TowerFeatures(tower, self.model.config.vision_feature_layer, self.image_processor)


def load(
    path: str | Path,
    vision_tower: str = "config",
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> LlavaMed:
    """Load a base model, frozen and in evaluation mode, from LLaVA-Med's own layout or transformers' LLaVA layout.

    Args:
        vision_tower: `config` (what `mm_vision_tower` names: a folder relative to the config or to the working
            directory, an absolute one, or a hub name), `checkpoint` (the tower inside the shards), or another folder or
            hub name.
        dtype: The dtype of the weights.
        quantization: `4bit` (NF4 with quantised constants) or `8bit` (LLM.int8) for the language model's linear layers,
            which compute in `dtype`; everything else keeps `dtype`. A layer is quantised as it is read, so the device
            never holds the whole model.

    Raises:
        ModelError: A file or weight is missing, unexpected, or of another shape; the message names all of them.
        ModuleNotFoundError: `quantization` without bitsandbytes.
    """
    path = Path(path)
    config = read_config(path)
    options = loading_options(dtype, quantization, device)
    with_tower = config.get("model_type") == "llava"
    if with_tower and vision_tower not in ("config", "checkpoint"):
        raise ModelError(f"{path}: transformers' layout includes its tower; set model.vision_tower to config")
    source = path if with_tower else tower_source(path, config, vision_tower)
    with without_compiler() if quantization is None else nullcontext():  # bitsandbytes compiles functions
        if with_tower:
            model = _load_transformers_layout(path, options)
        else:
            model = _load_llava_layout(path, config, vision_tower, source, options, device)
    model.set_attn_implementation(attn_implementation)
    if quantization is None:
        model.to(device)
    model.requires_grad_(False)
    model.eval()
    return _with_processors(path, model, source)


def loading_options(dtype: torch.dtype, quantization: str | None, device: torch.device | str) -> dict[str, Any]:
    """Return keyword arguments for `from_pretrained`.

    The method and its settings are those of QLoRA (Dettmers et al., 2023) and LLM.int8 (Dettmers et al., 2022).
    """
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is None:
        return options
    import_bitsandbytes()
    kind: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=UNQUANTISED)
    return {**options, "quantization_config": settings, "device_map": {"": device}}


def _load_transformers_layout(path: Path, options: Mapping[str, Any]) -> LlavaForConditionalGeneration:
    model, report = from_pretrained(LlavaForConditionalGeneration, path, "the model", options)
    check_report(path, report, set(report["unexpected_keys"]))
    return model


def _load_llava_layout(
    path: Path,
    config: Mapping[str, Any],
    vision_tower: str,
    tower_source: str | Path,
    options: Mapping[str, Any],
    device: torch.device | str,
) -> LlavaForConditionalGeneration:
    """Build the model on the meta device, then move every tensor straight from its shard to the device: memory never
    holds two copies of the weights, and the host never holds all of them for a GPU."""
    dtype = options["dtype"]
    quantized = "quantization_config" in options  # transformers quantises them on the way to the device.
    own_tower = vision_tower == "checkpoint"
    tower = None if own_tower else load_tower(path, tower_source, dtype)
    vision_config = tower.config if tower is not None else tower_config(tower_source)
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(llava_config(config, vision_config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    if tower is not None:
        state = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name, tensor in shard_tensors(path, expected, already=set(state), own_tower=own_tower):
        state[name] = tensor if quantized else tensor.to(device, dtype)
    if quantized:
        model = LlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state, **options)
    else:
        model.load_state_dict(state, strict=True, assign=True)
        model.config.dtype = dtype
    model.generation_config = GenerationConfig(
        bos_token_id=config.get("bos_token_id", 1), eos_token_id=config.get("eos_token_id", 2), pad_token_id=0
    )
    return model


def _with_processors(path: Path, model: LlavaForConditionalGeneration, tower_source: str | Path) -> LlavaMed:
    try:
        tokenizer = Tokenizer(path)
    except TokenizerError as error:
        raise ModelError(str(error)) from None
    rows = model.config.text_config.vocab_size
    image_token_id = model.config.image_token_id
    if image_token_id >= rows or tokenizer.piece_id("<image>") != image_token_id:
        image_token_id = tokenizer.piece_id(PLACEHOLDER_PIECE)
    if image_token_id is None or image_token_id == tokenizer.pad_token_id:
        raise ModelError(f"{path}: the tokenizer has no piece {PLACEHOLDER_PIECE} to represent an image patch")
    model.config.image_token_id = image_token_id
    try:
        processor = AutoImageProcessor.from_pretrained(tower_source, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{tower_source}: no image processor configuration ({error})") from None
    vision = model.config.vision_config
    return LlavaMed(model, tokenizer, processor, image_token_id, (vision.image_size // vision.patch_size) ** 2)
