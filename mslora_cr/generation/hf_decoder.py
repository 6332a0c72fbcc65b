"""Greedy decoding by transformers' own `generate`, for models whose prompts cannot share what comes before a question:
positions in two dimensions, windows, or images that attend in both directions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.input_processor import Prompt
from mslora_cr.distributed.comm import of_first_rank
from mslora_cr.generation.batching import Wave
from mslora_cr.generation.branches import Branches, Continuations
from mslora_cr.generation.prefix_decoder import OnToken, Stopping
from mslora_cr.models.base_model import inputs_on
from mslora_cr.models.language import base_of, caches_keys_alone

if TYPE_CHECKING:
    from peft import PeftModel


class _Read(NamedTuple):
    """Prompts that were read: their cache, and the scores after their last positions, (rows, 1, vocabulary)."""

    questions: tuple[int, ...]
    cache: Any
    logits: Tensor


class PlainDecoder:
    """Answers questions with a model, whole prompts at a time. It has the same methods as `prefix_decoder.Decoder`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        prompts: Sequence[Prompt],
        stopping: Stopping,
        mixed: QuestionBanks | None = None,
    ) -> None:
        self.model: Any = base_of(model)
        self.prompts = [replace(prompt, opening=(), rest=prompt.opening + prompt.rest) for prompt in prompts]
        self.mixed = mixed
        self._read: _Read | None = None
        self.stopping, self._device = stopping, self.model.get_input_embeddings().weight.device
        self._dtype = self.model.get_input_embeddings().weight.dtype
        self._settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=stopping.max_new_tokens,
            eos_token_id=sorted(stopping.end_ids),
            pad_token_id=stopping.padding,
        )

    def positions_that_fit(self) -> int | None:
        """None: the number is unknown."""
        return None

    def read(self, wave: Wave, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a wave's prompts on the model's device.

        Args:
            inputs: `ChatTemplateInputs.answering_batch` of its questions, in the order of its groups.
        """
        assert wave.whole, "this decoder reads whole prompts"
        return self.inputs_on_device(inputs)

    def inputs_on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return inputs_on(self._device, inputs, self._dtype)

    @torch.inference_mode()
    def answer(
        self,
        inputs: Mapping[str, Tensor],
        questions: Sequence[int],
        waiting: int = 1,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """Return the new ids of each question of a wave, up to and including the one that ends it.

        Args:
            waiting: Ignored: this decoder keeps nothing from one batch to the next.
            on_token: Called with each new token id, if the question is alone in its wave.
        """
        if self.mixed is not None:
            self.mixed.choose(questions)
        self._read = None
        streamer = _Streamer(questions[0], on_token) if on_token is not None else None
        with _first_scores(self.model) as first:
            made = self.model.generate(
                **inputs,
                generation_config=self._settings,
                streamer=streamer,
                return_dict_in_generate=True,
                logits_processor=LogitsProcessorList([_FirstRank()] if self.stopping.together else []),
            )
        length = inputs["input_ids"].shape[1]
        if first and caches_keys_alone(self.model) and _rewound(made.past_key_values, length):
            self._read = _Read(tuple(questions), made.past_key_values, first[0])
        return [self._cut(row) for row in made.sequences[:, length:].tolist()]

    @torch.inference_mode()
    def log_probabilities(
        self, inputs: Mapping[str, Tensor], questions: Sequence[int], continuations: Sequence[Continuations]
    ) -> list[list[list[float]]]:
        """As `prefix_decoder.Decoder.log_probabilities`.

        Prompts that were just answered are not read again. Their first continuations follow in one pass, then the
        second ones, and so on.
        """
        if self.mixed is not None:
            self.mixed.choose(questions)
        prompt = self._read_once(inputs, questions)
        mask = inputs["attention_mask"]
        scores_of: list[list[list[float]]] = [[] for _ in questions]
        for number in range(max(map(len, continuations))):
            rows = [row[number : number + 1] or [row[0]] for row in continuations]
            branches = Branches.of(rows, self.stopping.padding, self._device)
            logits = prompt.logits.float()
            if branches.ids.shape[1]:
                before = {
                    "attention_mask": torch.cat([mask, (branches.depth >= 0).to(mask)], dim=1),
                    "past_key_values": copy.deepcopy(prompt.cache),
                }
                positions = self._positions(branches.ids, before)
                output = self.model(input_ids=branches.ids, position_ids=positions, use_cache=True, **before)
                logits = torch.cat([logits, output.logits.float()], dim=1)
            for row, scores in enumerate(branches.gather(logits, rows)):
                if number < len(continuations[row]):
                    scores_of[row] += scores
        return scores_of

    def _read_once(self, inputs: Mapping[str, Tensor], questions: Sequence[int]) -> _Read:
        if self._read is None or self._read.questions != tuple(questions):
            positions = self._positions(inputs["input_ids"], dict(inputs))
            output = self.model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
            self._read = _Read(tuple(questions), output.past_key_values, output.logits[:, -1:])
        return self._read

    def _positions(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the positions as `generate` counts them: a model may have several a token, may remember what it
        counted for images, and may count from one.
        """
        counted: Tensor = self.model._prepare_position_ids_for_generation(ids, inputs)
        positions: Tensor = self.model.prepare_inputs_for_generation(ids, position_ids=counted)["position_ids"]
        return positions[..., -ids.shape[1] :]

    def _cut(self, ids: list[int]) -> list[int]:
        stop = next((index for index, token in enumerate(ids) if token in self.stopping.end_ids), len(ids))
        return ids[: stop + 1]


@contextmanager
def _first_scores(model: Any) -> Iterator[list[Tensor]]:
    """Collect the scores after the last position, (rows, 1, vocabulary), from the first pass inside the block."""
    first: list[Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        if not first:
            first.append(output.logits[:, -1:])

    handle = model.register_forward_hook(note)
    try:
        yield first
    finally:
        handle.remove()


def _rewound(cache: Cache, length: int) -> bool:
    """Cut a cache back to its first positions; False if a layer has forgotten some of them."""
    for layer in cache.layers:
        whole = type(layer) is DynamicLayer
        if not whole and not (
            type(layer) is DynamicSlidingWindowLayer and layer.cumulative_length < layer.sliding_window
        ):
            return False
    cache.crop(length - cache.get_seq_length())
    return True


class _FirstRank(LogitsProcessor):
    """Lets the first rank's scores choose the next tokens of all ranks."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return cast(torch.FloatTensor, of_first_rank(scores.contiguous()))


class _Streamer(BaseStreamer):
    def __init__(self, question: int, tell: OnToken) -> None:
        self._question, self._tell = question, tell
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Receive the prompt first, then one new id after the other."""
        if not self._prompt:
            self._tell(self._question, int(value.flatten()[0]))
        self._prompt = False

    def end(self) -> None:
        """Do nothing: the answer is also returned."""
