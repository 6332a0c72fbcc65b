"""Shared openings for any model, read by its own forward pass.

The model reads an opening itself, images included, so windows, bidirectional blocks of images and features of several
depths need no code here. The contents of transformers' cache are kept, together with the position that the language
model would get next. Questions then continue with text alone, as in `prefix_decoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.chat_template_inputs import BY_POSITION
from mslora_cr.data.input_processor import Prompt
from mslora_cr.generation.batching import Wave
from mslora_cr.generation.decode_state import Openings
from mslora_cr.generation.prefix_decoder import Decoder, Mask, Stopping
from mslora_cr.models.base_model import inputs_on
from mslora_cr.models.language import layer_types


class _Read(NamedTuple):
    """Openings that were read.

    Attributes:
        inputs: The model's, padded on the left.
        cache: Filled by the model.
        following: (openings,) int64, the position after each.
        next_logits: (openings, vocabulary) float32, after openings that are whole prompts.
    """

    inputs: Mapping[str, Tensor]
    cache: DynamicCache
    following: Tensor
    next_logits: Tensor | None


class ModelPrefixDecoder(Decoder):
    """Answers questions with a model that has a processor of its own."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], stopping: Stopping, mixed: QuestionBanks | None = None
    ) -> None:
        super().__init__(model, prompts, stopping, mixed)
        config = self.model.config.get_text_config()
        types = layer_types(self.model)
        window = getattr(config, "sliding_window", None)
        self.window = window if types == {"sliding_attention"} else None
        self._by_type = window if len(types) > 1 else None

    def positions_that_fit(self) -> int | None:
        """As `Decoder.positions_that_fit`, from the sizes in the configuration."""
        if self.device.type != "cuda":
            return None
        text = self.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        size = 2 * text.num_hidden_layers * text.num_key_value_heads * width * self.dtype.itemsize
        return int(torch.cuda.mem_get_info(self.device)[0] / 4 / size)

    def parts_of(self, openings: Any, questions: Sequence[int]) -> Iterator[list[int]]:
        """Yield the questions of a batch that are computed together."""
        yield list(questions)

    @torch.inference_mode()
    def read(self, wave: Wave, inputs: Mapping[str, Any]) -> Openings:
        """Compute a wave's openings.

        Args:
            inputs: `ChatTemplateInputs.answering_batch` of its groups' first questions, padded on the left.

        Raises:
            ValueError: The processor gives other ids for a whole batch than for its prompts alone.
        """
        opening = self._read(wave, inputs, DynamicCache())
        keys_values = [(layer.keys, layer.values) for layer in opening.cache.layers]
        visible = opening.inputs["attention_mask"].bool()
        return Openings(wave, keys_values, visible, opening.next_logits, opening.following)

    def _read(self, wave: Wave, inputs: Mapping[str, Any], cache: DynamicCache) -> _Read:
        first = [group.questions[0] for group in wave.groups]
        self._choose(first)
        cut = inputs_on(self.device, self._openings_of(wave, first, inputs), self.dtype)
        with _handed_positions(self._language) as handed:
            output = self.model(**{**self._model_inputs(dict(cut), cache), "logits_to_keep": 1})
        # Positions that are the same in all rows are handed to the language model once.
        following = (handed[0].amax((0, 2)) + 1).expand(len(first)) if handed else cut["attention_mask"].sum(1)
        return _Read(cut, cache, following, output.logits[:, -1].float() if wave.whole else None)

    def _openings_of(self, wave: Wave, first: Sequence[int], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs up to the openings' ends, padded on the left again."""
        if wave.whole:
            return dict(inputs)
        shape, whole = inputs["input_ids"].shape, inputs["attention_mask"].sum(1).tolist()
        behind = [len(self.prompts[question].rest) for question in first]
        for row, question in enumerate(first):
            if tuple(inputs["input_ids"][row, -behind[row] :].tolist()) != self.prompts[question].rest:
                raise ValueError("the model's processor gives other ids to a question in a batch than alone")
        lengths = [length - rest for length, rest in zip(whole, behind, strict=True)]
        cut = dict(inputs)
        for name, value in inputs.items():
            if name in BY_POSITION and value.shape[:2] == shape:
                rows = [
                    value[row, shape[1] - behind[row] - lengths[row] : shape[1] - behind[row]]
                    for row in range(len(first))
                ]
                cut[name] = _left_padded(rows, self.stopping.padding if name == "input_ids" else 0)
        return cut

    def _model_inputs(self, inputs: dict[str, Any], cache: DynamicCache) -> dict[str, Any]:
        """Return the model's inputs, from its own preparation for generation, positions included."""
        ids, model = inputs.pop("input_ids"), self.model
        inputs.setdefault("position_ids", model._prepare_position_ids_for_generation(ids, dict(inputs)))
        prepared = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, is_first_iteration=True, use_cache=True, **inputs
        )
        return dict(prepared)

    def _branching(self, seen: Tensor, order: Tensor) -> Mask:
        everything = super()._branching(seen, order)
        if self._by_type is None or isinstance(everything, dict):
            return everything
        near = order[:, -seen.shape[1] :, None] - order[:, None] < self._by_type
        return {"full_attention": everything, "sliding_attention": everything & near[:, None]}

    def _newest(self, visible: Tensor) -> Mask:
        seen = super()._newest(visible)
        if self._by_type is None or isinstance(seen, dict):
            return seen
        order = visible.cumsum(1)
        near = visible & (order > order[:, -1:] - self._by_type)
        return {"full_attention": seen, "sliding_attention": near[:, None, None]}

    def _causal(self, visible: Tensor, before: int, length: int) -> Mask:
        seen = super()._causal(visible, before, length)
        if self._by_type is None or isinstance(seen, dict):
            return seen
        order = visible.cumsum(1)
        near = order[:, None] > order[:, before : before + length, None] - self._by_type
        return {"full_attention": seen, "sliding_attention": seen & near[:, None]}


@contextmanager
def _handed_positions(language: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the positions, (parts, rows, positions), of the language model's first call inside the block, if it gets
    any."""
    handed: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions = named.get("position_ids")
        if positions is not None and not handed:
            # Where positions have three parts, a fourth in front counts tokens for masks.
            handed.append(positions[None] if positions.dim() == 2 else positions[-3:])

    handle = language.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield handed
    finally:
        handle.remove()


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    length = max(map(len, rows))
    padded = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), value)
    for row, ids in zip(padded, rows, strict=True):
        row[length - len(ids) :] = ids
    return padded
