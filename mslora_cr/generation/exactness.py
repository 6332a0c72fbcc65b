"""Tests whether a model gives the same answers from shared openings as from whole prompts.

Three questions about two images are answered both ways, and the scores of every next token are compared: first from
shared keys and values, then from copies of the whole cache. A model that can do neither exactly answers whole prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.chat import messages_of, render
from mslora_cr.data.chat_template_inputs import ChatTemplateInputs
from mslora_cr.data.input_processor import Prompt
from mslora_cr.data.records import Turn
from mslora_cr.distributed.comm import broadcast_object
from mslora_cr.generation.batching import Group, Limits, grouped, in_waves
from mslora_cr.generation.copied_prefix import CopyingDecoder
from mslora_cr.generation.hf_decoder import PlainDecoder
from mslora_cr.generation.model_prefix import ModelPrefixDecoder
from mslora_cr.generation.prefix_decoder import Stopping
from mslora_cr.models.language import caches_keys_alone

log = logging.getLogger(__name__)

QUESTIONS = (
    ("is this a cell?", 0),
    ("what does the picture show, left or right of the lesion?", 0),
    ("is it normal?", 1),
)
"""Each question, and the index of its image."""
NEW_TOKENS = 3
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""The largest difference of scores, as a share of their spread, by the model's dtype. 16-bit numbers round more."""
TOLERANCE_16 = 0.1
_exact_of: WeakKeyDictionary[nn.Module, type[ModelPrefixDecoder] | None] = WeakKeyDictionary()


def exact_decoder(
    model: nn.Module, inputs: ChatTemplateInputs, mixed: QuestionBanks | None = None
) -> type[ModelPrefixDecoder] | None:
    """Return the decoder by which a model may answer from shared openings, or None.

    Each model is tried once, and all ranks get the same result.

    Args:
        model: The base model, with or without banks in it.
        mixed: The banks of each question, if they are not the same for all.
    """
    if model not in _exact_of:
        _exact_of[model] = broadcast_object(_tried(model, inputs, mixed))
    return _exact_of[model]


def _tried(model: Any, inputs: ChatTemplateInputs, mixed: QuestionBanks | None) -> type[ModelPrefixDecoder] | None:
    candidates = (ModelPrefixDecoder, CopyingDecoder) if caches_keys_alone(model) else (CopyingDecoder,)
    exact = next((kind for kind in candidates if _is_exact(kind, model, inputs, mixed)), None)
    if exact is None:
        log.warning("%s answers whole prompts: it cannot continue exactly from openings", type(model).__name__)
    return exact


def _is_exact(
    kind: type[ModelPrefixDecoder], model: Any, inputs: ChatTemplateInputs, mixed: QuestionBanks | None
) -> bool:
    try:
        with torch.random.fork_rng(devices=[]):
            deviation = _deviation(kind, model, inputs, _FirstBanks(mixed) if mixed is not None else None)
    except Exception as error:
        log.info("%s: %s cannot continue from an opening (%s)", kind.__name__, type(model).__name__, error)
        return False
    exact = deviation <= TOLERANCE.get(model.get_input_embeddings().weight.dtype, TOLERANCE_16)
    if not exact:
        log.info("%s: scores of %s deviate by %.2g", kind.__name__, type(model).__name__, deviation)
    return exact


def _deviation(kind: type[ModelPrefixDecoder], model: Any, inputs: ChatTemplateInputs, mixed: Any) -> float:
    """Return the largest difference of a next token's scores, as a share of their spread."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((96, 64), (64, 80))
    images = [_noise(size, generator) for size in sizes]
    prompts = [_prompt(inputs, text, images[index], Path(f"image {index}")) for text, index in QUESTIONS]
    if not all(prompt.opening and prompt.rest for prompt in prompts):
        raise ValueError("prompts cannot be cut after their image")
    pictures = [[images[index]] for _, index in QUESTIONS]
    no_token = model.get_input_embeddings().num_embeddings
    never = Stopping(frozenset([no_token]), inputs.tokenizer.pad_token_id, NEW_TOKENS)
    plain = PlainDecoder(model, prompts, never, mixed)
    decoder = kind(model, prompts, never, mixed)
    [wave] = in_waves(_all_shared(prompts), prompts, Limits(len(prompts), NEW_TOKENS, 1 << 20))
    first = [group.questions[0] for group in wave.groups]
    openings = decoder.read(wave, inputs.answering_batch([prompts[q] for q in first], [pictures[q] for q in first]))
    worst = 0.0
    for part in decoder.parts_of(openings, wave.batches[0]):
        with _scores(model) as together:
            answers = decoder.answer(openings, part)
        for row, question in enumerate(part):
            with _scores(model) as alone:
                whole = plain.inputs_on_device(inputs.answering_batch([prompts[question]], [pictures[question]]))
                [ids] = plain.answer(whole, [question])
            for step in range(NEW_TOKENS):
                ours, theirs = together[step][row], alone[step][0]
                worst = max(worst, float((ours - theirs).abs().max() / theirs.std()))
                if answers[row][step] != ids[step]:
                    break
    return worst


def _all_shared(prompts: Sequence[Prompt]) -> list[Group]:
    """Read also the openings of groups of one question, so that one batch has rows of different openings."""
    groups = grouped(prompts, range(len(prompts)), lambda _: None)
    return [
        type(group)(
            group.questions, len(prompts[group.questions[0]].opening), len(prompts[group.questions[0]].rest), False
        )
        for group in groups
    ]


def _prompt(inputs: ChatTemplateInputs, text: str, image: Image.Image, name: Path) -> Prompt:
    question = Turn.model_validate({"from": "human", "value": text})
    rendered = render(inputs.processor, messages_of([question], 1), to_answer=True)
    opening, rest = inputs.split_ids(rendered, [image.size])
    return Prompt(opening, rest, (name,), rendered)


def _noise(size: tuple[int, int], generator: torch.Generator) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@contextmanager
def _scores(model: Any) -> Iterator[list[Tensor]]:
    """Collect the scores after the last position, (rows, vocabulary) float32, from each pass inside the block."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output[:, -1].float()))
    try:
        yield seen
    finally:
        handle.remove()


class _FirstBanks:
    """Lets the first question's banks answer every question."""

    def __init__(self, mixed: QuestionBanks) -> None:
        self._mixed = mixed

    def choose(self, questions: Sequence[int]) -> None:
        self._mixed.choose([0] * len(questions))
