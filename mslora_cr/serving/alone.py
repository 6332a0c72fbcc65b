"""Answers one prompt by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from mslora_cr.data.input_processor import InputProcessor, Prompt
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.prefix_decoder import OnToken
from mslora_cr.generation.run import decoder_of

if TYPE_CHECKING:
    from peft import PeftModel


def answer_and_probability(
    input_processor: InputProcessor,
    model: PreTrainedModel | PeftModel,
    ids: Sequence[int],
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    on_token: OnToken | None = None,
) -> tuple[list[int], float]:
    """Answer one prompt by itself.

    Args:
        model: The base model with the banks that answer.
        ids: The prompt's token ids, from `InputProcessor.asked`.
        inputs: The model's other inputs, from `InputProcessor.asked`.
        max_new_tokens: The most ids to generate.
        on_token: Called with each new token id.

    Returns:
        The new ids, up to and including the one that ends the answer, and their probability after the prompt,
        ``exp(Σ_t log p(token t))``.
    """
    prompts = [Prompt((), tuple(ids), ())]
    [wave] = in_waves(grouped(prompts, [0], lambda _: None), prompts, Limits(1, max_new_tokens, len(ids)))
    decoder: Any = decoder_of(input_processor, model, prompts, max_new_tokens)
    opening = decoder.read(wave, inputs)
    [answer] = decoder.answer(opening, [0], on_token=on_token)
    [[scores]] = decoder.log_probabilities(opening, [0], [[answer]])
    return answer, math.exp(sum(scores))
