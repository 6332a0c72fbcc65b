"""Greedy decoding of questions from openings that several of them share.

First the openings of a wave are read, images included, each once. Then its questions follow in batches: the text after
the opening, padded on the left, then one new token per step, until every row has ended or has the maximum length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedModel

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.collator import in_batches, rounded_up
from mslora_cr.data.input_processor import Prompt
from mslora_cr.distributed.comm import of_first_rank
from mslora_cr.generation.attention import SharedCache, membership, sharing
from mslora_cr.generation.batching import QUERIES, Wave
from mslora_cr.generation.branches import Branches, Continuations
from mslora_cr.generation.cuda_graphs import POSITIONS, StaticSteps, padded
from mslora_cr.generation.decode_state import Asked, Generated, Openings, Rows, unknown, with_known
from mslora_cr.models.language import base_of, language_linears, language_model

if TYPE_CHECKING:
    from peft import PeftModel

LOGITS = 1 << 26
"""The most logits that are held at once while continuations are scored: 256 MiB in float32."""
Mask = Tensor | dict[str, Tensor]
"""What positions see, (rows, 1, new positions, all positions) bool; or such a mask by type of layer."""
OnToken = Callable[[int, int], None]
"""Called with a question and its next token id."""


class Ends(Protocol):
    """The tokenizer interface that decoding uses."""

    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...


@dataclass(frozen=True)
class Stopping:
    """When an answer ends.

    Attributes:
        end_ids: Token ids that end an answer.
        padding: The token id that fills up rows.
        max_new_tokens: The length of the longest answer.
        together: Whether all ranks compute the same answers step by step: where they share the model's weights, none
            can run a step alone.
    """

    end_ids: frozenset[int]
    padding: int
    max_new_tokens: int
    together: bool = False

    @classmethod
    def of(cls, tokenizer: Ends, max_new_tokens: int, together: bool = False) -> Stopping:
        """An answer ends with the tokenizer's end of text."""
        return cls(frozenset([tokenizer.eos_token_id]), tokenizer.pad_token_id, max_new_tokens, together)


class Decoder:
    """Answers questions with a model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        prompts: Sequence[Prompt],
        stopping: Stopping,
        mixed: QuestionBanks | None = None,
    ) -> None:
        """
        Args:
            model: LLaVA, with banks in it or none.
            mixed: The banks of each question, where they are not the same for all.
        """
        self.model: LlavaForConditionalGeneration = base_of(model)
        self.prompts, self.stopping, self.mixed = prompts, stopping, mixed
        self._asked: Asked | None = None
        self._language = language_model(self.model)
        weight = self.model.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        plain = all(linear.weight.is_floating_point() for linear in language_linears(self.model).values())
        recordable = self.device.type == "cuda" and plain and not stopping.together
        self.steps = StaticSteps(record=True) if recordable else None
        """None computes steps directly. Kernels of quantised layers may wait for the device, which a graph cannot
        record; nor can it what ranks exchange."""
        # Not every text model has a window; LLaVA-Med's is null.
        self.window: int | None = self.model.config.text_config.to_dict().get("sliding_window")

    def positions_that_fit(self) -> int | None:
        """Return the number of positions whose keys and values fit into a quarter of the GPU's free memory; None on the
        CPU.

        The recorded steps' buffers hold them a second time, and prompts need memory while they are computed.
        """
        if self.device.type != "cuda":
            return None
        layers = self.model.model.language_model.layers
        size = 2 * len(layers) * layers[0].self_attn.k_proj.out_features * self.dtype.itemsize
        return int(torch.cuda.mem_get_info(self.device)[0] / 4 / size)

    @torch.inference_mode()
    def read(self, wave: Wave, inputs: Mapping[str, Tensor]) -> Openings:
        """Compute a wave's openings.

        Args:
            inputs: `LlavaMedInputs.answering_batch` of its groups' first questions: images, if there are any.
        """
        first = [group.questions[0] for group in wave.groups]
        self._choose(first)
        texts = [self.prompts[question].opening for question in first]
        if wave.whole:
            texts = [text + self.prompts[question].rest for text, question in zip(texts, first, strict=True)]
        # Whole prompts have many lengths, and cuDNN plans its attention anew for each; openings alone have one.
        ids, visible = self._padded(texts, POSITIONS if wave.whole and self.device.type == "cuda" else 1)
        pixels, cache = inputs.get("pixel_values"), DynamicCache()
        output = self.model(
            input_ids=ids,
            attention_mask=visible.long(),
            position_ids=_positions(visible),
            pixel_values=None if pixels is None else pixels.to(self.device, self.dtype),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        next_logits = output.logits[:, -1].float() if wave.whole else None
        keys_values = [(layer.keys, layer.values) for layer in cache.layers]
        return Openings(wave, keys_values, visible, next_logits, visible.sum(1))

    @torch.inference_mode()
    def answer(
        self, openings: Openings, questions: Sequence[int], waiting: int = 1, on_token: OnToken | None = None
    ) -> list[list[int]]:
        """Return the new ids of each question of a wave's batch, up to and including `</s>`.

        Args:
            waiting: The number of batches still to be answered, this one included.
            on_token: Called with each question's new token ids.
        """
        with sharing(self._language):
            asked, rows = self._begin(openings, questions)
            asked.answers.update({question: Generated() for question in questions})
            self._continue(rows, list(questions), asked.answers, waiting, on_token)
        return [asked.answers[question].ids for question in questions]

    @torch.inference_mode()
    def log_probabilities(
        self, openings: Openings, questions: Sequence[int], continuations: Sequence[Continuations]
    ) -> list[list[list[float]]]:
        """Return the log-probability of each token of each continuation of a question, given the tokens before it.

        Neither questions that were just answered nor their answers are read again. All other continuations of a
        question follow it in one row, as branches of a tree (tree attention, Miao et al., "SpecInfer", ASPLOS 2024).

        Args:
            continuations: For each question, any number of token sequences; empty ones are refused.
        """
        with sharing(self._language):
            asked = self._asked
            if asked is None or asked.openings is not openings or asked.questions != tuple(questions):
                asked, _ = self._begin(openings, questions)
            answers = [asked.answers.get(question, Generated()) for question in questions]
            unread = unknown(continuations, answers)
            scores: list[list[list[float]]] = [[] for _ in unread]
            for part in self._scoring_batches(unread):
                for row, found in zip(part, self._score(asked, part, [unread[row] for row in part]), strict=True):
                    scores[row] = found
        return with_known(continuations, answers, scores)

    def _scoring_batches(self, continuations: Sequence[Continuations]) -> list[list[int]]:
        """Return the rows to score at once, of those with continuations: as many as bounded memory for attention scores
        and logits allows."""
        asked = [row for row, several in enumerate(continuations) if several]
        positions = max(map(Branches.positions, continuations))
        logits = self.model.config.get_text_config().vocab_size * (1 + positions)
        rows = max(1, min(QUERIES // max(1, positions), LOGITS // logits))
        return [list(part) for part in in_batches(asked, rows)]

    def _score(
        self, asked: Asked, part: Sequence[int], continuations: Sequence[Continuations]
    ) -> list[list[list[float]]]:
        """Score the continuations of some rows of a batch."""
        openings, questions = asked.openings, [asked.questions[row] for row in part]
        chosen = torch.tensor(part, device=self.device)
        logits = [asked.logits[chosen][:, None].float()]
        branches = Branches.of(continuations, self.stopping.padding, self.device)
        length = branches.ids.shape[1]
        if not length:
            return branches.gather(logits[0], continuations)
        self._choose(questions)
        used, grouping = self._grouping(openings, questions)
        index = grouping[0]
        before, rest_visible = openings.visible[used][index], asked.visible[chosen]
        prompt = torch.cat([before, rest_visible], dim=1)
        order = torch.cat([_positions(prompt), prompt.sum(1)[:, None] + branches.depth], dim=1)
        positions = order[:, -length:] + (openings.next_positions[used][index] - before.sum(1))[:, None]
        rest = rest_visible.shape[1]
        own_states = [
            (_extended(keys[chosen, :, :rest], length), _extended(values[chosen, :, :rest], length))
            for keys, values in asked.caches
        ]
        cache = SharedCache(
            [(keys[used], values[used]) for keys, values in openings.keys_values],
            own_states,
            *grouping,
            torch.arange(rest, rest + length, device=self.device),
        )
        seen = self._branching(branches.seen(prompt), order)
        logits.append(self._forward(branches.ids, positions, seen, cache, length).float())
        return branches.gather(torch.cat(logits, dim=1), continuations)

    def _begin(self, openings: Openings, questions: Sequence[int]) -> tuple[Asked, Rows]:
        """Compute what follows the openings, and the first new token."""
        self._choose(questions)
        used, grouping = self._grouping(openings, questions)
        index = grouping[0]
        before = openings.visible[used][index]
        ids, suffix_visible = self._padded([() if openings.wave.whole else self.prompts[q].rest for q in questions])
        length = ids.shape[1]
        # The last new token's keys and values are never read.
        free = suffix_visible.new_zeros(len(questions), max(1, self.stopping.max_new_tokens - 1))
        visible = torch.cat([before, suffix_visible, free], dim=1)
        opening_states = [(keys[used], values[used]) for keys, values in openings.keys_values]
        space = visible.shape[1] - before.shape[1]
        suffixes = [
            (_zeros(keys, len(questions), space), _zeros(values, len(questions), space))
            for keys, values in opening_states
        ]
        slots = torch.arange(length, device=self.device)
        following = openings.next_positions[used][index][:, None]
        if length:
            cache = SharedCache(opening_states, suffixes, *grouping, slots)
            positions = (following + suffix_visible.cumsum(1) - 1).clamp(min=0)
            logits = self._forward(ids, positions, self._causal(visible, before.shape[1], length), cache)[:, -1]
            following = following + suffix_visible.sum(1, keepdim=True)
        else:
            assert openings.next_logits is not None
            logits = openings.next_logits[used][index]
        self._asked = Asked(openings, tuple(questions), suffix_visible, suffixes, logits)
        cache = SharedCache(opening_states, suffixes, *grouping, slots.new_tensor([length]))
        return self._asked, Rows(*self._next(logits), following, visible, cache)

    def _grouping(self, openings: Openings, questions: Sequence[int]) -> tuple[slice, tuple[Tensor, Tensor, Tensor]]:
        """Return which openings questions follow, and `group`, `index_in_group` and `members` of a `SharedCache`."""
        rows = [openings.wave.openings[question] for question in questions]
        first, last = rows[0], rows[-1]  # A batch's questions are in the order of the openings.
        group = [row - first for row in rows]
        index_in_group, members = membership(group, last + 1 - first)
        group_of = torch.tensor(group, device=self.device)
        return slice(first, last + 1), (group_of, index_in_group.to(self.device), members.to(self.device))

    def step(self, rows: Rows) -> None:
        """Compute one new token for each row, in place."""
        rows.visible.index_fill_(1, rows.cache.slots + rows.before, True)
        logits = self._forward(rows.ids, rows.positions, self._newest(rows.visible), rows.cache)[:, -1]
        for newest, following in zip((rows.ids, rows.scores), self._next(logits), strict=True):
            newest.copy_(following)
        rows.positions += 1
        rows.cache.slots += 1

    def _continue(
        self,
        rows: Rows,
        questions: list[int],
        answers: Mapping[int, Generated],
        waiting: int,
        on_token: OnToken | None,
    ) -> None:
        """Compute new tokens until every row has ended.

        Ended rows leave the batch once they are half of it, unless its steps are recorded: then they cost nothing.
        """
        static = None
        if self.steps is not None:
            static = self.steps.for_rows(rows, self.step, waiting, lambda count: self._choose(padded(questions, count)))
            if static is None:
                self._choose(questions)
            else:
                static.load(rows)
                rows = static.rows
        while True:
            going = self._append(answers, questions, (rows.ids, rows.scores), on_token)
            if not going:
                return
            if static is not None:
                static.step(self.step)
                continue
            if 2 * len(going) <= len(questions):
                rows, questions = rows.select(going), [questions[row] for row in going]
                self._choose(questions)
            self.step(rows)

    def _append(
        self,
        answers: Mapping[int, Generated],
        questions: Sequence[int],
        newest: tuple[Tensor, Tensor],
        on_token: OnToken | None,
    ) -> list[int]:
        """Append the newest token of each question and its log-probability to the answer, unless that has ended; return
        the places of the questions whose answers go on."""
        ids, scores = (values[: len(questions)].flatten().tolist() for values in newest)
        for question, token, score in zip(questions, ids, scores, strict=True):
            if not self._ended(answers[question].ids):
                answers[question].append(token, score)
                if on_token is not None:
                    on_token(question, token)
        return [row for row, question in enumerate(questions) if not self._ended(answers[question].ids)]

    def _ended(self, answer: Sequence[int]) -> bool:
        return len(answer) == self.stopping.max_new_tokens or (bool(answer) and answer[-1] in self.stopping.end_ids)

    def _next(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest ids, compared in float32 as in `generate`, and their log-probabilities, (rows, 1)."""
        scores = logits.float()
        ids = scores.argmax(-1, keepdim=True)
        if self.stopping.together:
            ids = of_first_rank(ids)
        return ids, scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True)

    def _choose(self, questions: Sequence[int]) -> None:
        """Assign the next rows to these questions."""
        if self.mixed is not None:
            self.mixed.choose(questions)

    def _forward(self, ids: Tensor, positions: Tensor, seen: Mask, cache: SharedCache, keep: int = 1) -> Tensor:
        """Return (rows, keep, vocabulary) after the last positions."""
        output = self.model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            shared=cache,
        )
        logits: Tensor = output.logits
        return logits

    def _branching(self, seen: Tensor, order: Tensor) -> Mask:
        """Return (rows, 1, new positions, all positions), from `Branches.seen` and the order of each row's tokens."""
        if self.window is not None:
            seen = seen & (order[:, -seen.shape[1] :, None] - order[:, None] < self.window)
        return seen[:, None]

    def _newest(self, visible: Tensor) -> Mask:
        """(rows, 1, 1, all positions): the newest position sees what is visible in its row."""
        seen = visible
        if self.window is not None:
            order = visible.cumsum(1)
            seen = seen & (order > order[:, -1:] - self.window)
        return seen[:, None, None]

    def _causal(self, visible: Tensor, before: int, length: int) -> Mask:
        """(rows, 1, length, all positions): each new position sees its opening and its own row up to itself."""
        new = torch.arange(length, device=self.device)[:, None]
        slots = torch.arange(visible.shape[1], device=self.device)[None] - before
        seen = visible[:, None] & (slots <= new)
        if self.window is not None:
            order = visible.cumsum(1)
            seen &= order[:, None] > order[:, before : before + length, None] - self.window
        return seen[:, None]

    def _padded(self, texts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Return ids padded on the left, and a mask that is false at padding; (texts, longest, rounded up) each."""
        length = rounded_up(max(map(len, texts), default=0), multiple)
        ids = [[self.stopping.padding] * (length - len(text)) + list(text) for text in texts]
        real = [[False] * (length - len(text)) + [True] * len(text) for text in texts]
        shape = (len(texts), length)
        return (
            torch.tensor(ids, dtype=torch.long, device=self.device).view(shape),
            torch.tensor(real, dtype=torch.bool, device=self.device).view(shape),
        )


def _positions(visible: Tensor) -> Tensor:
    return (visible.cumsum(1) - 1).clamp(min=0)


def _extended(states: Tensor, length: int) -> Tensor:
    """Return keys or values with room for further positions, (rows, heads, positions + length, width)."""
    return torch.cat([states, _zeros(states, len(states), length)], dim=2)


def _zeros(like: Tensor, rows: int, positions: int) -> Tensor:
    """Return room for keys or values, (rows, heads, positions, width)."""
    return like.new_zeros(rows, like.shape[1], positions, like.shape[3])
