"""Features of images that a folder caches, computed by the part of a base model that no bank changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.features import FeatureCache
from mslora_cr.distributed.comm import barrier, get_device, rank, world_size
from mslora_cr.models.base_model import BaseModel, GivenFeatures, moved
from mslora_cr.models.layout import ModelError

log = logging.getLogger(__name__)


class CachedFeatures:
    """What computes features, and the folder that caches them."""

    def __init__(self, folder: Path, given: GivenFeatures, device: torch.device) -> None:
        self._given, self._device = given, device
        self.cache = FeatureCache(folder / given.key)

    def fill(self, images: Sequence[Path], workers: int) -> None:
        """Compute the missing features of all images; the ranks share the work."""
        encode = partial(self._given.encode, device=self._device)
        with moved(self._given.modules, self._device):
            self.cache.fill(
                images[rank() :: world_size()],
                self._given.prepare,
                encode,
                workers,
                writers=world_size(),
                progress=rank() == 0,
            )
        barrier()


def cached_features(config: StreamConfig, base: BaseModel, projector_changes: bool = False) -> CachedFeatures | None:
    """Let the model take features, if `data.cache_image_features` asks for it and the model can; otherwise return None.

    Args:
        projector_changes: Whether a bank has a projector of its own.
    """
    folder = config.data.cache_image_features
    if not folder:
        return None
    try:
        given = base.given_features(projector_changes)
    except ModelError as error:
        log.warning("data.cache_image_features has no effect: %s", error)
        return None
    return CachedFeatures(Path(folder), given, get_device(config.model.device))
