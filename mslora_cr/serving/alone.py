"""One prompt answered by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from mslora_cr.data.input_processor import InputProcessor, Prompt
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.prefix_decoder import OnToken
from mslora_cr.generation.run import decoder_of


def answer_alone(
    input_processor: InputProcessor,
    model: PreTrainedModel | PeftModel,
    ids: Sequence[int],
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    on_token: OnToken | None = None,
) -> list[int]:
    """The new ids of one prompt, up to and with the one that ends it.

    Args:
        input_processor: the base model's input processor.
        model: the base model with the banks that answer.
        ids: the prompt's token ids, from `InputProcessor.asked`.
        inputs: what else the model reads, from `InputProcessor.asked`.
        max_new_tokens: the most ids to generate.
        on_token: called with each new token id.
    """
    return answer_and_probability(input_processor, model, ids, inputs, max_new_tokens, on_token)[0]


def answer_and_probability(
    input_processor: InputProcessor,
    model: PreTrainedModel | PeftModel,
    ids: Sequence[int],
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    on_token: OnToken | None = None,
) -> tuple[list[int], float]:
    """As `answer_alone`, and the probability of these ids behind the prompt, ``exp(Σ_t log p(token t))``."""
    prompts = [Prompt((), tuple(ids), ())]
    [wave] = in_waves(grouped(prompts, [0], lambda _: None), prompts, Limits(1, max_new_tokens, len(ids)))
    decoder: Any = decoder_of(input_processor, model, prompts, max_new_tokens)
    opening = decoder.read(wave, inputs)
    [answer] = decoder.answer(opening, [0], on_token=on_token)
    [[scores]] = decoder.log_probabilities(opening, [0], [[answer]])
    return answer, math.exp(sum(scores))
