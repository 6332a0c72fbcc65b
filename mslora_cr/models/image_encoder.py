"""Images as a language model receives them, for any model with a processor: features for a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.data.chat import render
from mslora_cr.models.base_check import READING_ERRORS
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
        self._language = language_model(model)

    @property
    def width(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[1])

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Everything except the language model, and the embeddings of its tokens."""
        around = [self._model.get_submodule(name) for name in beside_language(self._model)]
        owners = [module for module in self._model.modules() if self._language in module.children()]
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
        handle = self._language.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self._model(**inputs, use_cache=False)
        except _ReadingError as read:
            return self._mean(inputs["input_ids"], read.arguments)
        except torch.OutOfMemoryError:
            raise
        except READING_ERRORS as error:
            why = " ".join(str(error).split())[:200]
            raise ModelError(f"{type(self._model).__name__} cannot read a prompt of images alone ({why})") from None
        finally:
            handle.remove()
        raise ModelError(f"{type(self._model).__name__}: its forward pass does not call its language model")

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


def _stop(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _ReadingError(named)
