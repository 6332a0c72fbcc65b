"""Checks whether a folder can be a base model, before its weights are loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationMixin, PreTrainedModel

from mslora_cr.data.chat import messages_of, training_chat
from mslora_cr.data.chat_template_inputs import ChatSample, ChatTemplateInputs, NoImageError
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.data.records import Turn
from mslora_cr.models.language import language_linears
from mslora_cr.models.layout import ModelError, linear_name

QUESTION, ANSWER = "is this a cell?", "yes it is"
TURNS = ({"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER})
READING_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
"""What the forward pass of a model raises if its inputs do not fit."""
SIZES = ((64, 48), (48, 64))


def check_model(path: Path, model: PreTrainedModel) -> None:
    """Refuse a kind of model that cannot be trained here, without looking at its numbers.

    Raises:
        ModelError: With the reason.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise ModelError(
            f"{path}: {kind} reads questions with an encoder; a base model must be a decoder that reads both"
        )
    if not model.can_generate():
        raise ModelError(f"{path}: {kind} generates no text")
    if not isinstance(model, GenerationMixin):
        raise ModelError(f"{path}: {kind} does not write its answers token by token, as banks learn them")
    takes = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    if not any("pixel" in name or "image" in name for name in takes):
        raise ModelError(f"{path}: {kind} takes no images")
    pixels = takes.get("pixel_values")
    if pixels is not None and pixels.default is inspect.Parameter.empty:
        raise ModelError(f"{path}: {kind} takes no question without an image, which records may have")
    linears = language_linears(model)
    if not linears:
        raise ModelError(f"{path}: {kind} has no linear layers in its language model's decoder layers")
    if odd := [name for name in linears if linear_name(name, exact=True) != name]:
        raise ModelError(f"{path}: {kind} names a layer {odd[0]}, and a bank with such a name could not be read again")


def check_processor(path: Path, processor: Any, end_ids: tuple[int, ...]) -> None:
    """Refuse a processor with which the tokens of answers cannot be located, with one image, with two, or with none.

    A record without an image is refused by itself, if the processor needs one.

    Raises:
        ModelError: With the reason.
    """
    inputs = ChatTemplateInputs(processor, end_ids, max_length=1 << 20, all_images=True)
    for images in (SIZES[:1], SIZES, ()):
        turns = [Turn.model_validate(turn) for turn in TURNS]
        try:
            chat = training_chat(
                processor,
                messages_of(turns, len(images)),
                processor.tokenizer.convert_ids_to_tokens(list(end_ids)),
                processor.tokenizer.eos_token,
            )
            pictures = [Image.new("RGB", size) for size in images]
            labels = inputs.batch([ChatSample(index=0, text=chat.text, answers=chat.answers, images=pictures)])[
                "labels"
            ]
        except NoImageError:
            continue
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(f"{path}: a conversation about {len(images)} images cannot be prepared ({why})") from None
        learned = processor.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True)
        if ANSWER not in " ".join(learned.split()) or QUESTION in learned:
            raise ModelError(f"{path}: in a conversation whose answer is {ANSWER!r}, {learned!r} would be learned")


@torch.no_grad()
def check_loss(base: Any, batch: dict[str, Any], keep: torch.Tensor, targets: torch.Tensor) -> None:
    """Try a labelled batch on a loaded model: its loss must be the cross entropy of the logits that are kept.

    Args:
        batch: One record, without labels, on the model's device.
        keep: (1, length) bool, the positions that predict a label.
        targets: (kept,) int64.

    Raises:
        ModelError: The forward pass fails, or computes another loss.
    """
    kind = type(base.model).__name__
    try:
        # The bank's dropout draws random numbers, and later steps must not change by that.
        with torch.random.fork_rng():
            output = base.model(**batch, logits_to_keep=keep, use_cache=False, labels=targets, shift_labels=targets)
    except torch.OutOfMemoryError:
        raise
    except READING_ERRORS as error:
        raise ModelError(f"{kind} cannot read the first record ({' '.join(str(error).split())[:200]})") from None
    wanted = torch.nn.functional.cross_entropy(output.logits.float().view(len(targets), -1), targets)
    if not torch.allclose(output.loss.float(), wanted, rtol=1e-2, atol=1e-3):
        raise ModelError(f"{kind} computes a loss of {output.loss:.4f} where the labels' is {wanted:.4f}")
