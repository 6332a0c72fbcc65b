"""One prompt answered by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from mslora_cr.data.preparation import Preparation, Prompt
from mslora_cr.data.processor import ProcessorPreparation
from mslora_cr.evaluation import decoding
from mslora_cr.evaluation.decoding import OnToken
from mslora_cr.evaluation.plain_decoding import PlainDecoder
from mslora_cr.evaluation.prefix import Group, Wave


def answer_alone(
    prepare: Preparation,
    model: PreTrainedModel | PeftModel,
    ids: Sequence[int],
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    on_token: OnToken | None = None,
) -> list[int]:
    """The new ids of one prompt, up to and with the one that ends it.

    Args:
        ids, inputs: as `Preparation.asked` gives them.
        on_token: is told them as they come.
    """
    if not isinstance(prepare, ProcessorPreparation):
        pixels = inputs.get("pixel_values")
        return decoding.answer_alone(model, ids, pixels, prepare.tokenizer, max_new_tokens, on_token)
    prompts = [Prompt((), tuple(ids), ())]
    decoder = PlainDecoder(model, prompts, prepare.end_ids, prepare.tokenizer.pad_token_id, max_new_tokens)
    wave = Wave((Group((0,), len(ids), 0, whole=True),), ((0,),))
    return decoder.read(wave, {"input_ids": torch.tensor([list(ids)]), **inputs}, on_token).ids[0]
