"""The vision tower without its model, for images whose features are cached in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.features import FeatureCache, feature_key
from mslora_cr.distributed.comm import barrier, get_device, rank, world_size
from mslora_cr.models.base_model import BaseModel, Tower
from mslora_cr.models.vision import detach_tower, tower_features

log = logging.getLogger(__name__)


class CachedFeatures:
    """The tower, taken out of its model, and the folder that caches its features."""

    def __init__(self, folder: Path, model: Any, tower: Tower, device: torch.device) -> None:
        self._layer, self._processor = tower.layer, tower.image_processor
        self._tower, self._device = detach_tower(model), device
        self.cache = FeatureCache(folder / feature_key(self._tower, self._layer, self._processor))

    def fill(self, images: Sequence[Path], workers: int) -> None:
        """Compute the missing features of all images; the ranks share the work."""
        self._tower.to(self._device)
        self.cache.fill(images[rank() :: world_size()], self._processor, self._encode, workers, progress=rank() == 0)
        self._tower.to("cpu")
        barrier()

    @torch.inference_mode()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        parameter = next(self._tower.parameters())
        return tower_features(self._tower, self._layer, pixels.to(parameter.device, parameter.dtype))


def cached_features(config: StreamConfig, base: BaseModel) -> CachedFeatures | None:
    """Return the tower without its model, if `data.cache_image_features` asks for it and the model has one to take out;
    otherwise None."""
    folder = config.data.cache_image_features
    if not folder:
        return None
    if base.tower is None:
        log.warning("data.cache_image_features has no effect: this base model's features are computed at every step")
        return None
    return CachedFeatures(Path(folder), base.model, base.tower, get_device(config.model.device))
