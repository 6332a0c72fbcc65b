"""The vision tower: where to find it, and its features without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mslora_cr.data.features import feature_key
from mslora_cr.data.images import preprocess, tower_folder
from mslora_cr.data.llava_med_inputs import TOWER_FEATURES
from mslora_cr.models.layout import ModelError, check_numbers, check_report, from_pretrained
from mslora_cr.utils.strict_json import JsonError, read_object


def detach_tower(model: LlavaForConditionalGeneration) -> nn.Module:
    """Take the vision tower out of a model, which then accepts its features (`tower_features`) in place of pixels."""
    tower = model.model.vision_tower
    model.model.vision_tower = _GivenFeatures(model.config.vision_feature_layer)
    return tower


def tower_features(tower: nn.Module, layer: int, pixels: Tensor) -> Tensor:
    """Return (images, positions, width): the tower's states that the projector reads, class position included."""
    return tower(pixels, output_hidden_states=True).hidden_states[layer]


class TowerFeatures:
    """Computes the features of LLaVA-Med's tower without its model; see `base_model.GivenFeatures`."""

    def __init__(self, tower: nn.Module, layer: int, image_processor: Any) -> None:
        self._tower, self._layer, self._processor = tower, layer, image_processor
        self.prepare = partial(preprocess, processor=image_processor)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [self._tower]

    @property
    def key(self) -> str:
        return feature_key(self._tower.state_dict(), self._layer, self._processor)

    @torch.inference_mode()
    def encode(self, prepared: Sequence[Tensor], device: torch.device) -> list[dict[str, Tensor]]:
        pixels = torch.stack(list(prepared)).to(device, next(self._tower.parameters()).dtype)
        features = tower_features(self._tower, self._layer, pixels).cpu()
        return [{TOWER_FEATURES: of_image.contiguous()} for of_image in features]


class TowerEncoder:
    """An image as LLaVA-Med's tower sees it: the mean over its patches, at the layer that the projector reads."""

    def __init__(self, tower: nn.Module, layer: int) -> None:
        self._tower, self._layer = tower, layer

    @property
    def width(self) -> int:
        return int(self._tower.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [self._tower]

    @torch.no_grad()
    def features(self, images: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return `images`: (images, 3, height, width) of each record."""
        counts = [len(of_prompt) for of_prompt in images]
        features = torch.zeros(len(images), self.width)
        if any(counts):
            inputs = torch.cat(list(images)).to(device, next(self._tower.parameters()).dtype)
            patches = tower_features(self._tower, self._layer, inputs)[:, 1:].float().mean(1).cpu()
            for row, of_prompt in enumerate(patches.split(counts)):
                if len(of_prompt):
                    features[row] = of_prompt.mean(0)
        return features


class _GivenFeatures(nn.Module):
    """Replaces a tower: its input is already the features."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, hidden_states={self.layer: pixel_values})


def tower_source(path: Path, config: Mapping[str, Any], vision_tower: str) -> str | Path:
    """Return the tower's folder, or its hub name if there is no folder of that name."""
    name = vision_tower if vision_tower not in ("config", "checkpoint") else config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path}/config.json: mm_vision_tower is missing")
    folder = tower_folder(path, name)
    if folder is not None:
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{path}/config.json: mm_vision_tower is {name!r}, but there is no such folder in or beside {path}, nor "
            "below the working directory; put CLIP there or set model.vision_tower"
        )
    return name


def load_named_tower(path: Path, config: Mapping[str, Any]) -> CLIPVisionModel:
    """Return the tower that a LLaVA-Med configuration names, in float32.

    Raises:
        ModelError: It cannot be found or loaded.
    """
    return load_tower(path, tower_source(path, config, "config"), torch.float32)


def tower_config(source: str | Path) -> CLIPVisionConfig:
    if isinstance(source, Path):
        if not (source / "config.json").exists():  # Otherwise transformers would use the default sizes.
            raise ModelError(f"{source}: config.json is missing")
        try:
            check_numbers(source / "config.json", read_object(source / "config.json"))
        except JsonError as error:
            raise ModelError(f"{error}") from None
    try:
        return CLIPVisionConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: no configuration of a CLIP vision tower ({error})") from None


def load_tower(path: Path, source: str | Path, dtype: torch.dtype) -> CLIPVisionModel:
    tower_config(source)
    tower, report = from_pretrained(
        CLIPVisionModel,
        source,
        f"the vision tower that {path}/config.json names",
        {"dtype": dtype},
        "; download it, or set model.vision_tower to its folder (or to `checkpoint` for the tower inside the shards)",
    )
    check_report(source, report, unexpected=set())  # A full CLIP has a text model as well.
    return tower
