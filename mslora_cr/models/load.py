"""Loads any base model from its folder or from a run's configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.answers.boxes import BoxRule, rule_of
from mslora_cr.data.chat_template_inputs import ChatTemplateInputs
from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.lengths import read_limit
from mslora_cr.data.llava_med_inputs import SQUARE, LlavaMedInputs
from mslora_cr.data.prompts import IMAGE_INDEX
from mslora_cr.distributed.comm import world_size
from mslora_cr.models import llava_med
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.cached_features import CachedFeatures
from mslora_cr.models.digest import weights_digest
from mslora_cr.models.family import family_of
from mslora_cr.models.kernels import use_kernels
from mslora_cr.models.layout import ModelError
from mslora_cr.models.processor_base import end_ids_of, load_processor, load_with_processor
from mslora_cr.models.split import split_over_gpus
from mslora_cr.utils.kernels import chosen_kernels

log = logging.getLogger(__name__)


def load_model(
    path: Path,
    vision_tower: str = "config",
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> BaseModel:
    """Load a base model, frozen and in evaluation mode. The arguments are those of `llava_med.load`.

    Raises:
        ModelError: As `llava_med.load`; or `vision_tower` is set for a model whose tower is part of its weights.
    """
    if not family_of(path).own_template:
        return llava_med.load(path, vision_tower, dtype, attn_implementation, device, quantization)
    if vision_tower not in ("config", "checkpoint"):
        raise ModelError(f"{path}: the model includes its tower; set model.vision_tower to config")
    options = llava_med.loading_options(dtype, quantization, device)
    return load_with_processor(path, {**options, "attn_implementation": attn_implementation}, device)


def load_base(
    config: StreamConfig, device: torch.device | str, kernels: Literal["liger", "torch"] | None = None
) -> BaseModel:
    """Load the base model of a configuration.

    Args:
        kernels: The library of the small operations, from `kernels_of`; None takes the one for answering.

    Raises:
        ModelError: As `load_model`; or `model.kernels` is liger, which has no kernel for the model; or it is to be
            split and cannot be.
    """
    split = config.model.device_map is not None and torch.device(device).type == "cuda"
    if split and (world_size() > 1 or not family_of(Path(config.model.path)).own_template):
        raise ModelError(
            "model.device_map splits a base model with its own processor, and for one process; LLaVA-Med fits one GPU, "
            "and several processes need one each"
        )
    base = load_model(
        Path(config.model.path),
        vision_tower=config.model.vision_tower,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=config.model.attn_implementation,
        device="cpu" if split else device,
        quantization=config.model.quantization,
    )
    chosen = kernels or answering_kernels(config, device)
    if not use_kernels(base.model, chosen) and chosen == "liger":
        why = f"Liger has no kernel for {type(base.model).__name__}"
        if config.model.kernels == "liger":
            raise ModelError(f"model.kernels: {why}; set it to torch")
        log.warning("%s: PyTorch's kernels are used", why)
    if split:
        split_over_gpus(base.model)
    return base


def kernels_of(config: StreamConfig) -> Literal["liger", "torch"]:
    """Return the library that computes the small operations in training."""
    return chosen_kernels(config.model.kernels, config.model.device)


def answering_kernels(config: StreamConfig, device: torch.device | str) -> Literal["liger", "torch"]:
    """Return the library that computes a model's small operations while it answers: that of training, with two
    exceptions.

    In float32, where answers must be the same on every machine, and wherever Liger cannot run, it is PyTorch.
    """
    if config.model.dtype == "float32" or config.model.kernels == "torch":
        return "torch"
    return chosen_kernels("auto", torch.device(device).type)


def base_digest(config: StreamConfig) -> str:
    """Return the digest of the configuration's base model, its vision tower included; reads some of its weights."""
    return weights_digest(Path(config.model.path), config.model.vision_tower)


def input_processor_without_weights(config: StreamConfig) -> InputProcessor:
    """Return the input preparation of the configuration's base model, to encode texts and measure samples without
    decoding images.

    Raises:
        ModelError: The processor cannot be read.
        DataError: LLaVA-Med's tokenizer or config.json cannot be read.
    """
    return input_processor_in(Path(config.model.path), config.data.max_length, config.data.images == "all")


def input_processor_in(path: Path, max_length: int, all_images: bool = False) -> InputProcessor:
    """Do what `input_processor_without_weights` does, for a base model's folder."""
    if family_of(path).own_template:
        processor = load_processor(path)
        return ChatTemplateInputs(processor, end_ids_of(path, processor), max_length, all_images)
    limit = read_limit(path, max_length)
    return LlavaMedInputs(limit.tokenizer, None, IMAGE_INDEX, limit.patches, limit.max_length, all_images)


def box_rule_of(path: Path) -> BoxRule:
    """Return how the base model of a folder writes boxes.

    Raises:
        ModelError: The processor cannot be read.
    """
    return rule_of(load_processor(path)) if family_of(path).own_template else SQUARE


def input_processor_of(config: StreamConfig, base: BaseModel, features: CachedFeatures | None = None) -> InputProcessor:
    cache = features.cache if features else None
    return base.input_processor(config.data.max_length, config.data.images == "all", cache)
