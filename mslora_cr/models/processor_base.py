"""Any image-text model that transformers loads, with its own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.video_processing_utils import BaseVideoProcessor

from mslora_cr.data.chat import render
from mslora_cr.data.chat_template_inputs import ChatTemplateInputs
from mslora_cr.data.features import FeatureCache
from mslora_cr.models.base_model import Tower
from mslora_cr.models.language import language_linears, language_model
from mslora_cr.models.layout import ModelError, check_report, from_pretrained

SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@dataclass
class ProcessorBase:
    """A loaded base model with its processor; see `base_model.BaseModel`."""

    model: PreTrainedModel
    processor: Any

    @property
    def tower(self) -> Tower | None:
        return None

    @cached_property
    def image_encoder(self) -> ProjectedEncoder:
        return ProjectedEncoder(self.model, self.processor)

    def input_processor(
        self, max_length: int, all_images: bool, features: FeatureCache | None = None
    ) -> ChatTemplateInputs:
        assert features is None, "features of these models are not kept"
        return ChatTemplateInputs(self.processor, end_ids(self.model, self.processor), max_length, all_images)


def load_with_processor(path: Path, options: dict[str, Any], device: torch.device | str) -> ProcessorBase:
    """A base model, frozen and in evaluation mode, from a folder in transformers' layout.

    Args:
        options: what `from_pretrained` is told besides the place.

    Raises:
        ModelError: the folder lacks something, or holds something else; it is named.
    """
    processor = load_processor(path)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = beside_language(empty_model_of(path))
    model, report = from_pretrained(AutoModelForImageTextToText, path, "the model", {**options, **SAFE})
    check_report(path, report, set(report["unexpected_keys"]))
    if "quantization_config" not in options:
        model.to(device)
    model.requires_grad_(False)
    model.eval()
    if not language_linears(model):
        raise ModelError(f"{path}: {type(model).__name__} has no linear layers in its language model's decoder layers")
    return ProcessorBase(model, processor)


def beside_language(model: PreTrainedModel) -> list[str]:
    """The modules that stand beside the language model, which keep their dtype when its layers are quantised."""
    language, inside = language_model(model), model.get_submodule("model")
    outside = [f"model.{name}" for name, module in inside.named_children() if module is not language]
    return [*outside, *(name for name, _ in model.named_children() if name != "model")]


def load_processor(path: Path) -> Any:
    """The processor of a model's folder, with images by Pillow, which are the same whatever else is installed.

    No video is shown to a model here, so a processor of videos, which would need torchvision, is left out.

    Raises:
        ModelError: the folder holds none, or it has no chat template.
    """
    try:
        config = AutoConfig.from_pretrained(path, **SAFE)
        kind = PROCESSOR_MAPPING[type(config)]
        settings, rest = kind.get_processor_dict(path, **SAFE)
        parts = {
            "tokenizer": lambda: AutoTokenizer.from_pretrained(path, **SAFE),
            "image_processor": lambda: AutoImageProcessor.from_pretrained(path, backend="pil", **SAFE),
            "video_processor": BaseVideoProcessor,
        }
        wanted = kind.get_attributes()
        if unknown := sorted(set(wanted) - parts.keys()):
            raise ModelError(f"{path}: {kind.__name__} needs {', '.join(unknown)}, which is not supported")
        processor = _without_video(kind).from_args_and_dict([parts[name]() for name in wanted], settings, **rest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        if isinstance(error, ModelError):
            raise
        _refuse(path, error)
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ModelError(f"{path}: the processor has no chat template; take the model's instruction-tuned version")
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def _refuse(path: Path, error: Exception) -> NoReturn:
    raise ModelError(f"{path}: the model's processor cannot be loaded ({error or type(error).__name__})") from None


class _NoVideo:
    """Lets a processor be made without a processor of videos."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return type(argument)
        return cast(Any, super()).check_argument_for_proper_class(name, argument)


def _without_video(kind: type[ProcessorMixin]) -> Any:
    if "video_processor" not in kind.get_attributes():
        return kind
    return type(kind.__name__, (_NoVideo, kind), {"__module__": kind.__module__})


def end_ids(model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """The ids that end an answer: the model's own, and the tokenizer's."""
    told = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = told if isinstance(told, list | tuple) else [told]
    return tuple(dict.fromkeys(token for token in (*several, processor.tokenizer.eos_token_id) if token is not None))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, without numbers."""
    with init_empty_weights(include_buffers=False):
        return cast(PreTrainedModel, AutoModelForImageTextToText.from_config(config, trust_remote_code=False))


def empty_model_of(path: Path) -> PreTrainedModel:
    """The model of a folder, without numbers.

    Raises:
        ModelError: the configuration is not one of an image-text model.
    """
    try:
        return empty_model(AutoConfig.from_pretrained(path, **SAFE))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: config.json describes no model ({error or type(error).__name__})") from None


class _ReadingError(Exception):
    """Carries what a language model is about to read out of the model around it."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings


class ProjectedEncoder:
    """An image as the language model is given it: the mean of the embeddings at its positions, behind tower and
    projector. Found by handing a prompt of images alone to the model, and stopping it before its language model."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._language = language_model(model)

    @property
    def width(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[1])

    @property
    def modules(self) -> Sequence[nn.Module]:
        inside = self._model.get_submodule("model")
        around: list[nn.Module] = [module for module in inside.children() if module is not self._language]
        around += [nn.ParameterList(inside.parameters(recurse=False)), self._model.get_input_embeddings()]
        return [module for module in around if list(module.parameters())]

    @torch.no_grad()
    def features(self, images: Sequence[Any], device: torch.device) -> Tensor:
        features = torch.zeros(len(images), self.width)
        for row, own in enumerate(images):
            if own:
                features[row] = self._of(own, device)
        return features

    def _of(self, images: Sequence[Any], device: torch.device) -> Tensor:
        text = render(self._processor, [{"role": "user", "content": [{"type": "image"}] * len(images)}])
        dtype = self._model.get_input_embeddings().weight.dtype
        inputs = self._processor(text=[text], images=[list(images)], return_tensors="pt").to(device, dtype)
        ids = inputs["input_ids"]
        handle = self._language.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self._model(**inputs, use_cache=False)
        except _ReadingError as read:
            here = torch.isin(ids, torch.tensor(self._processor.image_token_ids, device=ids.device))
            return read.embeddings[here].float().mean(0).cpu()
        finally:
            handle.remove()
        raise ModelError(f"{type(self._model).__name__}: its language model reads no embeddings")


def _stop(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _ReadingError(named["inputs_embeds"])
