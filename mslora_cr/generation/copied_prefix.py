"""Shared openings for models that keep more than keys and values of text: recurrent states, or cross attention.

An opening is read once, as in `model_prefix`, and its cache is copied for each question. A state has no place for
padding, so questions are computed together only if the texts after their openings are of one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.input_processor import Prompt
from mslora_cr.generation.batching import Wave
from mslora_cr.generation.branches import Branches, Continuations
from mslora_cr.generation.decode_state import Generated, unknown, with_known
from mslora_cr.generation.model_prefix import ModelPrefixDecoder
from mslora_cr.generation.prefix_decoder import OnToken, Stopping


@dataclass
class States:
    """What the model keeps of some rows.

    Attributes:
        cache: By layer.
        visible: (rows, positions) int64, 0 where a row is padded.
        positions: (rows,) int64, the position after each row.
        crossing: (rows, 1, images, tiles) int64, the tiles that the next tokens see; None without cross attention.
    """

    cache: DynamicCache
    visible: Tensor
    positions: Tensor
    crossing: Tensor | None

    def select(self, rows: Sequence[int]) -> States:
        """Return a copy of these rows; a row may be taken several times."""
        index = torch.tensor(rows, device=self.visible.device)
        cache = deepcopy(self.cache)
        cache.reorder_cache(index)
        crossing = None if self.crossing is None else self.crossing[index]
        return States(cache, self.visible[index], self.positions[index], crossing)


@dataclass(frozen=True)
class CopiedOpenings:
    """The states after a wave's openings.

    Attributes:
        wave: The openings.
        states: A row for each.
        next_logits: (openings, vocabulary) float32, after openings that are whole prompts.
    """

    wave: Wave
    states: States
    next_logits: Tensor | None


@dataclass(frozen=True)
class CopiedQuestions:
    """Questions that were read together, so that continuations of them can be scored.

    Attributes:
        openings: The openings that they follow.
        states: A row for each.
        logits: (questions, vocabulary) float32, after them.
        answers: The answers to the questions that were answered.
    """

    openings: CopiedOpenings
    states: States
    logits: Tensor
    answers: dict[int, Generated]


class CopyingDecoder(ModelPrefixDecoder):
    """Answers questions from copies of an opening's cache."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], stopping: Stopping, mixed: QuestionBanks | None = None
    ) -> None:
        super().__init__(model, prompts, stopping, mixed)
        self._copied: dict[tuple[int, ...], CopiedQuestions] = {}
        """The questions that were answered last, by the part of a batch in which they were computed."""

    @torch.inference_mode()
    def read(self, wave: Wave, inputs: Mapping[str, Any]) -> CopiedOpenings:  # type: ignore[override]
        """As `ModelPrefixDecoder.read`."""
        opening = self._read(wave, inputs, DynamicCache(config=self.model.config))
        crossing = opening.inputs.get("cross_attention_mask")
        states = States(
            opening.cache,
            opening.inputs["attention_mask"],
            opening.following,
            None if crossing is None else crossing[:, -1:],
        )
        return CopiedOpenings(wave, states, opening.next_logits)

    @torch.inference_mode()
    def answer(  # type: ignore[override]
        self, openings: CopiedOpenings, questions: Sequence[int], waiting: int = 1, on_token: OnToken | None = None
    ) -> list[list[int]]:
        """As `Decoder.answer`."""
        parts = list(self.parts_of(openings, questions))
        self._copied = {tuple(part): self._answer(openings, part, on_token) for part in parts}
        answers = {question: given.ids for asked in self._copied.values() for question, given in asked.answers.items()}
        return [answers[question] for question in questions]

    @torch.inference_mode()
    def log_probabilities(  # type: ignore[override]
        self, openings: CopiedOpenings, questions: Sequence[int], continuations: Sequence[Continuations]
    ) -> list[list[list[float]]]:
        """As `Decoder.log_probabilities`, one continuation of each question after the other."""
        wanted = dict(zip(questions, continuations, strict=True))
        scores: dict[int, list[list[float]]] = {}
        for part in self.parts_of(openings, questions):
            asked = self._copied.get(tuple(part))
            if asked is None or asked.openings is not openings:
                asked = CopiedQuestions(openings, *self._after(openings, part), {})
            answers = [asked.answers.get(question, Generated()) for question in part]
            several = [wanted[question] for question in part]
            found = self._score_copies(asked, part, unknown(several, answers))
            scores |= zip(part, with_known(several, answers, found), strict=True)
        return [scores[question] for question in questions]

    def _score_copies(
        self, asked: CopiedQuestions, part: Sequence[int], continuations: Sequence[Continuations]
    ) -> list[list[list[float]]]:
        """Score the continuations of some questions, each question's first ones together, then the second ones."""
        found: list[list[list[float]]] = [[] for _ in part]
        for number in range(max(map(len, continuations))):
            rows = [row for row, several in enumerate(continuations) if number < len(several)]
            one_each = [continuations[row][number : number + 1] for row in rows]
            branches, logits = Branches.of(one_each, self.stopping.padding, self.device), asked.logits[rows][:, None]
            if branches.ids.shape[1]:
                self._choose([part[row] for row in rows])
                followed = self._follow(asked.states.select(rows), branches.ids, branches.ids.shape[1])
                logits = torch.cat([logits, followed], dim=1)
            for row, scored in zip(rows, branches.gather(logits, one_each), strict=True):
                found[row] += scored
        return found

    def parts_of(self, openings: CopiedOpenings, questions: Sequence[int]) -> Iterator[list[int]]:
        """Yield questions with equally long texts after their openings, which need no padding."""

        def length(question: int) -> int:
            return 0 if openings.wave.whole else len(self.prompts[question].rest)

        for _, part in groupby(sorted(questions, key=length), length):
            yield list(part)

    def _after(self, openings: CopiedOpenings, questions: Sequence[int]) -> tuple[States, Tensor]:
        """Return the states after some questions, and (questions, vocabulary) float32, scores of their first token."""
        self._choose(questions)
        rows = [openings.wave.openings[question] for question in questions]
        states = openings.states.select(rows)
        if openings.next_logits is not None:
            return states, openings.next_logits[rows]
        rest = torch.tensor([self.prompts[question].rest for question in questions], device=self.device)
        return states, self._follow(states, rest, 1)[:, -1]

    def _answer(self, openings: CopiedOpenings, questions: Sequence[int], on_token: OnToken | None) -> CopiedQuestions:
        asked = CopiedQuestions(
            openings, *self._after(openings, questions), {question: Generated() for question in questions}
        )
        states, logits, rows = asked.states.select(range(len(questions))), asked.logits, list(questions)
        while True:
            ids, scores = self._next(logits)
            going = self._append(asked.answers, rows, (ids, scores), on_token)
            if not going:
                return asked
            if 2 * len(going) <= len(rows):
                states, ids, rows = states.select(going), ids[going], [rows[row] for row in going]
                self._choose(rows)
            logits = self._follow(states, ids, 1)[:, -1]

    def _follow(self, states: States, ids: Tensor, keep: int) -> Tensor:
        """Read further ids of each row, (rows, length); return the scores after the last `keep` of them, in float32."""
        length = ids.shape[1]
        states.visible = torch.cat([states.visible, torch.ones_like(ids)], dim=1)
        crossing = {}
        if states.crossing is not None:
            crossing = {"cross_attention_mask": states.crossing.expand(-1, length, -1, -1)}
        output = self.model(
            input_ids=ids,
            attention_mask=states.visible,
            position_ids=states.positions[:, None] + torch.arange(length, device=self.device),
            past_key_values=states.cache,
            use_cache=True,
            logits_to_keep=keep,
            **crossing,
        )
        states.positions = states.positions + length
        logits: Tensor = output.logits
        return logits.float()
