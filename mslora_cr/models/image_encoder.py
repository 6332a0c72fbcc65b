"""Images as a language model receives them, for any model with a processor: features for a router, and for a cache."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mslora_cr.data.chat import render
from mslora_cr.data.chat_template_inputs import ChatTemplateInputs
from mslora_cr.data.features import MODEL_INPUT, EncodedImage, feature_key, flattened
from mslora_cr.data.input_processor import Prompt
from mslora_cr.models.base_check import READING_ERRORS
from mslora_cr.models.base_model import inputs_on
from mslora_cr.models.language import beside_language, language_model
from mslora_cr.models.layout import ModelError


class _ReadingError(Exception):
    """Raised to carry the language model's inputs out of the model around it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class ProjectedEncoder:
    """An image as the language model receives it: the mean of what tower and projector put in place of its tokens' own
    embeddings, or of the states that cross attention reads.

    A forward pass of a prompt of images alone is stopped before the language model.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self._model, self._processor = model, processor

    @property
    def width(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[1])

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Everything except the language model, and the embeddings of its tokens."""
        around = [self._model.get_submodule(name) for name in beside_language(self._model)]
        owners = [module for module in self._model.modules() if language_model(self._model) in module.children()]
        around += [nn.ParameterList(owner.parameters(recurse=False)) for owner in owners]
        around.append(self._model.get_input_embeddings())
        return [module for module in around if list(module.parameters())]

    @torch.no_grad()
    def features(self, images: Sequence[Any], device: torch.device) -> Tensor:
        """As `base_model.ImageEncoder.features`.

        Raises:
            ModelError: The language model receives nothing that comes from images.
        """
        features = torch.zeros(len(images), self.width)
        for row, of_prompt in enumerate(images):
            if of_prompt:
                features[row] = self._of(of_prompt, device)
        return features

    def _of(self, images: Sequence[Any], device: torch.device) -> Tensor:
        text = render(self._processor, [{"role": "user", "content": [{"type": "image"}] * len(images)}])
        dtype = self._model.get_input_embeddings().weight.dtype
        inputs = self._processor(text=[text], images=[list(images)], return_tensors="pt").to(device, dtype)
        try:
            received = _received(self._model, inputs)
        except torch.OutOfMemoryError:
            raise
        except READING_ERRORS as error:
            why = " ".join(str(error).split())[:200]
            raise ModelError(f"{type(self._model).__name__} cannot read a prompt of images alone ({why})") from None
        return self._mean(inputs["input_ids"], received)

    def _mean(self, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        embeddings, states = arguments.get("inputs_embeds"), arguments.get("cross_attention_states")
        if embeddings is not None:
            placeholders = (embeddings != self._model.get_input_embeddings()(ids)).any(-1)
            features = embeddings[placeholders]
        else:
            features = states.flatten(0, -2) if isinstance(states, Tensor) else torch.empty(0)
        if not len(features) or features.shape[-1] != self.width:
            raise ModelError(f"{type(self._model).__name__}: its language model reads images in an unknown way")
        return features.float().mean(0).cpu()


def _received(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the language model gets in a forward pass, which stops there.

    Raises:
        ModelError: It gets none.
    """
    handle = language_model(model).register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _ReadingError as read:
        return read.arguments
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__}: its forward pass does not call its language model")


def _stop(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _ReadingError(named)


# --- features in place of pixels -------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""The largest difference between what the language model receives from pixels and from kept features, as a share of the
numbers' spread, by dtype. 16-bit numbers round more, and differently in batches of other sizes."""
TOLERANCE_16 = 0.05
PROBED = ((96, 64), (64, 80))
"""Sizes of the probe's images."""
_refused: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def why_not_given(model: PreTrainedModel) -> str | None:
    """Return why a model takes no features in place of pixels, as far as that is known without trying; None: it takes
    them."""
    if MODEL_INPUT not in inspect.signature(model.forward).parameters:
        return "its forward pass takes none"
    if not hasattr(model.base_model, "get_image_features"):
        return "it has no get_image_features"
    return _refused.get(model)


class ProjectedFeatures:
    """Computes what tower and projector make of an image, all that a model's `get_image_features` returns; see
    `base_model.GivenFeatures`.

    A model takes it if its language model then receives the same as from pixels.
    """

    def __init__(self, model: PreTrainedModel, inputs: ChatTemplateInputs, encoder: ProjectedEncoder) -> None:
        """
        Raises:
            ModelError: The model does not take features; the message says why.
        """
        self._model, self._inputs, self.modules = model, inputs, encoder.modules
        self.prepare = partial(_alone, inputs)
        why = why_not_given(model)
        if why is None and model not in _refused:
            why = _refused[model] = self._tried()
        if why is not None:
            raise ModelError(f"{type(model).__name__} takes no features in place of pixels: {why}")

    @property
    def key(self) -> str:
        language, words = language_model(self._model), self._model.get_input_embeddings().weight
        left_out = {id(tensor) for tensor in (*language.parameters(), *language.buffers(), words)}
        left_out |= {id(tensor) for tensor in self._model.get_output_embeddings().parameters()}
        tensors = self._model.state_dict(keep_vars=True)
        seen = {name: tensor for name, tensor in tensors.items() if id(tensor) not in left_out}
        processor = self._inputs.processor
        return feature_key(seen, (type(self._model).__name__, type(processor).__name__), processor.image_processor)

    @torch.no_grad()
    def encode(self, prepared: Sequence[Mapping[str, Any]], device: torch.device) -> list[dict[str, Tensor]]:
        make, dtype = self._model.base_model.get_image_features, self._model.get_input_embeddings().weight.dtype
        taken = inspect.signature(make).parameters
        found = []
        for inputs in prepared:
            arguments = {name: value for name, value in inputs.items() if name in taken}
            found.append(flattened(make(**inputs_on(device, arguments, dtype), return_dict=True)))
        return found

    def _tried(self) -> str | None:
        """Return why kept features are not the same to the language model as pixels; None if they are."""
        device, dtype = self._model.device, self._model.get_input_embeddings().weight.dtype
        random = torch.Generator().manual_seed(0)
        images = [_noise(size, random) for size in PROBED]
        try:
            encoded = [self.encode([self.prepare(image)], device)[0] for image in images]
            kept = [EncodedImage(image.size, features) for image, features in zip(images, encoded, strict=True)]
            ours, theirs = (
                _received(self._model, inputs_on(device, _probe(self._inputs, pictures), dtype))
                for pictures in (kept, images)
            )
        except torch.OutOfMemoryError:
            raise
        except (ModelError, *READING_ERRORS) as error:
            return " ".join(str(error).split())[:200]
        exact = _deviation(ours, theirs) <= TOLERANCE.get(dtype, TOLERANCE_16)
        return None if exact else "its language model receives other numbers than from pixels"


def _alone(inputs: ChatTemplateInputs, image: Image.Image) -> dict[str, Any]:
    """Return the processor's output for an image alone."""
    return inputs.answering_batch([_showing(inputs, 1)], [[image]])


def _showing(inputs: ChatTemplateInputs, images: int) -> Prompt:
    """Return a prompt of so many images, each followed by a word."""
    content = [{"type": "image"}, {"type": "text", "text": "image"}]
    text = render(inputs.processor, [{"role": "user", "content": content * images}])
    return Prompt((), (), (), text)


def _probe(inputs: ChatTemplateInputs, pictures: Sequence[Any]) -> dict[str, Any]:
    """Return a batch of prompts with one image and with two, one of them twice."""
    rows = [pictures[:1], pictures[1:], pictures[::-1], [pictures[0], pictures[0]]]
    return inputs.answering_batch([_showing(inputs, len(row)) for row in rows], rows)


def _noise(size: tuple[int, int], random: torch.Generator) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=random, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _deviation(ours: Any, theirs: Any) -> float:
    """Return the largest difference between two nests of tensors, as a share of a tensor's spread; infinite if their
    structure differs."""
    pairs = [[part for part in tree_leaves(each) if isinstance(part, Tensor)] for each in (ours, theirs)]
    shapes = [[(part.shape, part.dtype) for part in parts] for parts in pairs]
    if shapes[0] != shapes[1]:
        return math.inf
    worst = 0.0
    for one, other in zip(*pairs, strict=True):
        spread = other.float().std() if other.is_floating_point() else torch.tensor(1.0)
        worst = max(worst, float((one.float() - other.float()).abs().max() / spread.clamp(min=1e-12)))
    return worst
