"""The interface of a base model for the rest of the program.

`llava_med.LlavaMed` is LLaVA-Med, in the published protocol; `processor_base.ProcessorBase` is any model that
transformers loads with a processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils import recursively_apply
from PIL import Image
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


class GivenFeatures(Protocol):
    """Computes features of images that a model takes in place of pixels, so that they can be cached."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The modules that compute them."""

    @property
    def key(self) -> str:
        """A digest of everything that decides features, besides the image."""

    @property
    def prepare(self) -> Callable[[Image.Image], Any]:
        """Returns the inputs of one image. It is cheap to send to data loader workers."""

    def encode(self, prepared: Sequence[Any], /, device: torch.device) -> list[dict[str, Tensor]]:
        """Return the features of each prepared image by name, on the CPU.

        Args:
            device: Where the modules are.
        """


class BaseModel(Protocol):
    """A loaded base model, frozen, with everything that prepares its inputs."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def image_encoder(self) -> ImageEncoder: ...
    def input_processor(
        self, max_length: int, all_images: bool, features: FeatureCache | None = None, /
    ) -> InputProcessor:
        """Prepare inputs from records."""

    def given_features(self, projector_changes: bool, /) -> GivenFeatures:
        """Let the model take features of images in place of pixels.

        Args:
            projector_changes: Whether a bank has a projector of its own.

        Raises:
            ModelError: It takes none; the message says why.
        """


def inputs_on(
    device: torch.device | str, inputs: Mapping[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Return a model's inputs on its device, nested ones too.

    Args:
        dtype: The dtype of floating-point numbers; None leaves theirs.
    """

    def move(value: Tensor) -> Tensor:
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)

    return {name: recursively_apply(move, value) for name, value in inputs.items()}


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
