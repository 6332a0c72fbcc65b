"""The interface of a base model for the rest of the program.

`llava_med.LlavaMed` is LLaVA-Med, in the published protocol; `processor_base.ProcessorBase` is any model that
transformers loads with a processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.data.features import FeatureCache
from mslora_cr.data.input_processor import InputProcessor


class ImageEncoder(Protocol):
    """Computes image features for a router, which no bank changes."""

    @property
    def width(self) -> int: ...
    @property
    def modules(self) -> Sequence[nn.Module]:
        """The modules that compute them."""

    def features(self, images: Sequence[Any], device: torch.device, /) -> Tensor:
        """Return (records, width) float32 on the CPU: the mean over a record's images; zeros for a record without
        images.

        Args:
            images: Each record's images, as `InputProcessor.process_images` returns them.
        """


@dataclass(frozen=True)
class Tower:
    """A vision tower that works without its model, so that its features can be cached."""

    layer: int
    """The layer whose hidden states the projector reads."""
    image_processor: Any


class BaseModel(Protocol):
    """A loaded base model, frozen, with everything that prepares its inputs."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def tower(self) -> Tower | None:
        """The vision tower, or None if features of this model's images cannot be cached."""

    @property
    def image_encoder(self) -> ImageEncoder: ...
    def input_processor(
        self, max_length: int, all_images: bool, features: FeatureCache | None = None, /
    ) -> InputProcessor:
        """Prepare inputs from records."""


@contextmanager
def moved(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules to a device inside the block, and afterwards back to where each was."""
    homes = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
