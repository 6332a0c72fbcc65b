"""Any image-text model that transformers loads, with its own processor and chat template."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.video_processing_utils import BaseVideoProcessor

from mslora_cr.data.chat import DATE, asks_for_date, dated
from mslora_cr.data.chat_template_inputs import ChatTemplateInputs, takes_answers_apart
from mslora_cr.data.features import FeatureCache
from mslora_cr.models.base_check import check_model, check_processor
from mslora_cr.models.image_encoder import ProjectedEncoder, ProjectedFeatures
from mslora_cr.models.language import beside_language
from mslora_cr.models.layout import ModelError, check_report, from_pretrained, reason
from mslora_cr.models.split import is_split
from mslora_cr.utils.strict_json import read_object

QUESTION_ALONE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
"""The chat template of a processor that has none, and writes all but a question's text and its answer's by itself."""
SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@dataclass
class ProcessorBase:
    """A loaded base model with its processor; see `base_model.BaseModel`."""

    model: PreTrainedModel
    processor: Any

    @cached_property
    def image_encoder(self) -> ProjectedEncoder:
        return ProjectedEncoder(self.model, self.processor)

    def input_processor(
        self, max_length: int, all_images: bool, features: FeatureCache | None = None
    ) -> ChatTemplateInputs:
        return ChatTemplateInputs(self.processor, end_ids(self.model, self.processor), max_length, all_images, features)

    def given_features(self, projector_changes: bool = False) -> ProjectedFeatures:
        """As `base_model.BaseModel.given_features`."""
        if projector_changes:
            raise ModelError("banks change the projector, behind which this base model's features are kept")
        if is_split(self.model):
            raise ModelError("the model is split over several GPUs")
        return ProjectedFeatures(self.model, self.input_processor(1 << 20, True), self.image_encoder)


def load_with_processor(path: Path, options: dict[str, Any], device: torch.device | str) -> ProcessorBase:
    """Load a base model, frozen and in evaluation mode, from a folder in transformers' layout.

    Args:
        options: Keyword arguments for `from_pretrained`.

    Raises:
        ModelError: The folder lacks something, or contains something else; the message names it.
    """
    processor = load_processor(path)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = beside_language(empty_model_of(path))
    if not _attends_by(path, options.get("attn_implementation")):
        options["attn_implementation"] = "eager"
    model, report = from_pretrained(AutoModelForImageTextToText, path, "the model", {**options, **SAFE})
    check_report(path, report, set(report["unexpected_keys"]))
    if "quantization_config" not in options:
        model.to(device)
    model.requires_grad_(False)
    model.eval()
    model.generation_config = greedy_settings(model)
    check_model(path, model)
    if "mm_token_type_ids" in inspect.signature(inspect.unwrap(type(model).forward)).parameters:
        processor.return_mm_token_type_ids = True  # Some processors give them on request alone.
    check_processor(path, processor, end_ids(model, processor))
    take_logits_to_keep(model)
    return ProcessorBase(model, processor)


def _attends_by(path: Path, implementation: str | None) -> bool:
    """Return whether the folder's model has this attention; transformers refuses it if it has PyTorch's alone."""
    kind = AutoModelForImageTextToText._model_mapping[type(AutoConfig.from_pretrained(path, **SAFE))]
    return implementation != "sdpa" or kind._supports_sdpa


def greedy_settings(model: PreTrainedModel) -> GenerationConfig:
    """Return a model's generation settings without those that would make greedy decoding choose another token than the
    likeliest.

    A folder's `generation_config.json` may contain penalties, suppressed or forced tokens, or a minimum length.
    `generate` applies them unless it is told otherwise, and servers do so with an exported folder. The token ids stay.
    """
    defaults = getattr(model, "generation_config", None) or GenerationConfig()
    return GenerationConfig(
        bos_token_id=defaults.bos_token_id, eos_token_id=defaults.eos_token_id, pad_token_id=defaults.pad_token_id
    )


def load_processor(path: Path) -> Any:
    """Return the processor of a model's folder, with images processed by Pillow, so that pixels do not depend on
    installed packages.

    Its class is the one that the folder's files name, as for `AutoProcessor`, or transformers' class for the model's
    type. Models receive no video and no sound here, so stand-ins with the folder's settings replace those parts.

    Raises:
        ModelError: The folder has none, it needs a package that is not installed, or it has no chat template.
    """
    try:
        kind = _processor_class(path)
        settings, rest = kind.get_processor_dict(path, **SAFE)
        if "image_processor" not in kind.get_attributes():
            raise ModelError(f"{path}: {kind.__name__} takes no images")
        parts = [_part(name, path, settings) for name in kind.get_attributes()]
        processor = _without_video(kind).from_args_and_dict(parts, settings, **rest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: the model's processor cannot be loaded ({reason(error)[:200]})") from None
    if not (processor.chat_template or processor.tokenizer.chat_template) and takes_answers_apart(processor):
        processor.chat_template = QUESTION_ALONE
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ModelError(f"{path}: the processor has no chat template; take the model's instruction-tuned version")
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    template = processor.chat_template
    several = isinstance(template, dict)  # by name, of which "default" is used
    processor.chat_template = {name: dated(text) for name, text in template.items()} if several else dated(template)
    return processor


def template_date(processor: Any) -> str | None:
    """Return the date that stands for today's in a processor's chat template, as ISO 8601 has it; None: it asks for
    none.
    """
    return DATE.date().isoformat() if asks_for_date(str(processor.chat_template)) else None


def _processor_class(path: Path) -> Any:
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = path / name
        named = read_object(file).get("processor_class") if file.is_file() else None
        if isinstance(named, str):
            kind = processor_class_from_name(named)
            if kind is None:
                raise ModelError(f"{file}: processor_class is {named[:80]!r}, which transformers does not have")
            return kind
    config = AutoConfig.from_pretrained(path, **SAFE)
    if type(config) not in PROCESSOR_MAPPING:
        raise ModelError(f"{path}: transformers has no processor for the model type {config.model_type}")
    return PROCESSOR_MAPPING[type(config)]


def _part(name: str, path: Path, settings: Mapping[str, Any]) -> Any:
    """Load one of the objects that make up a processor."""
    if name == "image_processor":
        return AutoImageProcessor.from_pretrained(path, backend="pil", **SAFE)
    if name.endswith("tokenizer"):
        return AutoTokenizer.from_pretrained(path / name if (path / name).is_dir() else path, **SAFE)
    part_settings = settings.get(name)
    file = path / f"{name.removesuffix('_processor')}_preprocessor_config.json"
    if not isinstance(part_settings, Mapping) and file.is_file():
        part_settings = read_object(file)
    stand_in = UnusedPart()
    for key, value in (part_settings if isinstance(part_settings, Mapping) else {}).items():
        setattr(stand_in, key, value)
    return stand_in


class UnusedPart(BaseVideoProcessor):
    """Stands in for a processor's video or sound part. A setting that the folder lacks is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _UsedPartsAlone:
    """Lets a processor be made with stand-ins for its video and sound parts."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if isinstance(argument, BaseVideoProcessor):
            return BaseVideoProcessor
        return cast(Any, super()).check_argument_for_proper_class(name, argument)


def _without_video(kind: type[ProcessorMixin]) -> Any:
    """Return the processor's class, extended to take stand-ins for video and sound."""
    return type(kind.__name__, (_UsedPartsAlone, kind), {"__module__": kind.__module__})


def end_ids(model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """Return the ids that end an answer: the model's own, and the tokenizer's."""
    return _end_ids(model.generation_config, processor)


def _end_ids(generation_config: GenerationConfig | None, processor: Any) -> tuple[int, ...]:
    ends = generation_config.eos_token_id if generation_config is not None else None
    several = ends if isinstance(ends, list | tuple) else [ends]
    return tuple(dict.fromkeys(token for token in (*several, processor.tokenizer.eos_token_id) if token is not None))


def end_ids_of(path: Path, processor: Any) -> tuple[int, ...]:
    """Return the `end_ids` of a model from its folder alone."""
    try:
        generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:  # most of the older folders have no generation_config.json
        generation_config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, **SAFE))
    return _end_ids(generation_config, processor)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration, without weights."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForImageTextToText.from_config(config, trust_remote_code=False))


def empty_model_of(path: Path) -> PreTrainedModel:
    """Return the model of a folder, without weights.

    Raises:
        ModelError: The configuration does not describe an image-text model, or one that needs a missing package.
    """
    try:
        return empty_model(AutoConfig.from_pretrained(path, **SAFE))
    except ImportError as error:
        raise ModelError(f"{path}: the model cannot be loaded ({reason(error)})") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: config.json describes no model ({reason(error)})") from None


def keeps_logits(model: PreTrainedModel) -> bool:
    """Return whether a model's own forward pass takes `logits_to_keep` and shifted labels."""
    forward = inspect.unwrap(type(model).forward)
    return "logits_to_keep" in inspect.signature(forward).parameters and "loss_function" in forward.__code__.co_names


def take_logits_to_keep(model: PreTrainedModel) -> None:
    """Let a model without them take `logits_to_keep`, `labels` and `shift_labels`.

    The instance's `forward` is replaced, since PEFT calls `forward` itself, past every hook.
    """
    if keeps_logits(model):
        return
    plain, head = model.forward, model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} does not tell which layer computes its logits")

    @functools.wraps(plain)
    def forward(*args: Any, logits_to_keep: Tensor | int = 0, labels: Tensor | None = None, **options: Any) -> Any:
        of_loss = {name: options.pop(name) for name in ("shift_labels", "num_items_in_batch") if name in options}
        handle = head.register_forward_pre_hook(
            lambda _, inputs: (_last_positions(inputs[0], logits_to_keep), *inputs[1:])
        )
        try:
            output = plain(*args, **options)
        finally:
            handle.remove()
        if labels is not None:
            output["loss"] = ForCausalLMLoss(output.logits, labels, output.logits.shape[-1], **of_loss)
        return output

    signature, added = (
        inspect.signature(plain),
        inspect.signature(forward, follow_wrapped=False).parameters["logits_to_keep"],
    )
    parameters = [*signature.parameters.values(), *([] if added.name in signature.parameters else [added])]
    parameters.sort(key=lambda parameter: parameter.kind)
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    model.forward = forward


def _last_positions(hidden: Tensor, keep: Tensor | int) -> Tensor:
    return hidden[:, -keep:] if isinstance(keep, int) and keep else hidden if isinstance(keep, int) else hidden[keep]
