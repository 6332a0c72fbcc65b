"""A base model's folder → the base model, whichever it is."""

from __future__ import annotations

from pathlib import Path

import torch

from mslora_cr.models import llava_med
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.layout import ModelError, has_processor
from mslora_cr.models.processor_base import load_with_processor


def load_model(
    path: Path,
    vision_tower: str = "config",
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> BaseModel:
    """Load a base model, frozen and in evaluation mode. Arguments: as `llava_med.load`.

    Raises:
        ModelError: as `llava_med.load`; or `vision_tower` is given for a model that has its tower in its weights.
    """
    if not has_processor(path):
        return llava_med.load(path, vision_tower, dtype, attn_implementation, device, quantization)
    if vision_tower not in ("config", "checkpoint"):
        raise ModelError(f"{path}: the model includes its tower; set model.vision_tower to config")
    options = llava_med.loading_options(dtype, quantization, device)
    return load_with_processor(path, {**options, "attn_implementation": attn_implementation}, device)
