"""Writes a base model as a folder that transformers, PEFT and vLLM load without this project."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.family import family_of
from mslora_cr.models.language import adapter_targets
from mslora_cr.models.layout import ModelError
from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.models.processor_base import SAFE, ProcessorBase, empty_model_of, template_date
from mslora_cr.models.transformers_layout import portable_processor, save_transformers_layout

PROCESSOR_FILES = (".json", ".jinja", ".txt", ".model")
"""Endings of files that hold tokenizers, image processors and templates."""
_WRITTEN = ("config.json", "generation_config.json", "export.json")
_DECIDE_UNLESS_1 = ("repetition_penalty", "encoder_repetition_penalty", "num_beams", "guidance_scale")
_DECIDE = (
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens"),
    *("begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    *("exponential_decay_length_penalty", "force_words_ids", "watermarking_config", "stop_strings", "do_sample"),
)
"""Generation settings with which a program may not choose the likeliest tokens, or ends an answer elsewhere."""
LLAVA_MED_CLASS = ("LlavaForConditionalGeneration", "transformers.models.llava.modeling_llava")


def writer_of(base: BaseModel, path: Path) -> Callable[[Path], None]:
    """Return a function that writes the current model and its processor into an empty folder.

    Args:
        path: The folder from which the model was read. Its processor's files are copied as they are.

    Raises:
        ModelError: LLaVA-Med's tokenizer cannot be written so that it gives the same ids.
    """
    if isinstance(base, LlavaMed):
        processor = portable_processor(base)
        return lambda folder: save_transformers_layout(base, processor, folder)

    assert isinstance(base, ProcessorBase), "there are two kinds of base model"

    def write(folder: Path) -> None:
        base.model.save_pretrained(folder)
        for file in sorted(path.iterdir()):
            replaced = file.name in _WRITTEN or file.name.endswith(".index.json")
            if file.suffix in PROCESSOR_FILES and file.is_file() and not replaced:
                shutil.copyfile(file, folder / file.name)
        if template_date(base.processor) and isinstance(base.processor.chat_template, str):
            (folder / "chat_template.jinja").write_text(base.processor.chat_template, encoding="utf-8")

    return write


def deciding_settings(path: Path) -> list[str]:
    """Return the generation settings in a model's folder that `_DECIDE` and `_DECIDE_UNLESS_1` name.

    Programs that load the folder itself apply them. Answers here do without them, and so does a folder from
    `writer_of`.
    """
    try:
        settings = GenerationConfig.from_pretrained(path, local_files_only=True).to_dict()
    except OSError:  # Most of the older folders have no generation_config.json.
        return []
    found = [name for name in _DECIDE_UNLESS_1 if settings.get(name) not in (None, 1)]
    return found + [
        name for name in _DECIDE if settings.get(name) or (name.endswith("_id") and settings.get(name) == 0)
    ]


def exported_targets(path: Path, names: Iterable[str]) -> list[str] | None:
    """Return the names of a bank's layers if PEFT would rewrite a pattern of them; None for most models.

    Raises:
        ModelError: The folder's configuration cannot be read.
    """
    if not family_of(path).own_template:
        return None
    targets = adapter_targets(empty_model_of(path), names)
    return targets if isinstance(targets, list) else None


def class_of(path: Path) -> tuple[str, str]:
    """Return the class with which transformers loads an exported model, and its module.

    Raises:
        ModelError: The folder's configuration cannot be read.
    """
    if not family_of(path).own_template:
        return LLAVA_MED_CLASS
    try:
        kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(AutoConfig.from_pretrained(path, **SAFE))]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: config.json describes no model ({error})") from None
    return kind.__name__, kind.__module__
