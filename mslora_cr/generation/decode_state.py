"""The state of a batch: its openings, the questions that were read, and the rows that are being answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mslora_cr.generation.attention import KeysValues, SharedCache, membership
from mslora_cr.generation.batching import Wave
from mslora_cr.generation.branches import Continuations


@dataclass(frozen=True)
class Openings:
    """The keys and values of a wave's openings."""

    wave: Wave
    keys_values: list[KeysValues]
    visible: Tensor
    """(openings, positions) bool: false where an opening is padded."""
    next_logits: Tensor | None
    """(openings, vocabulary) float32, after openings that are whole prompts."""
    next_positions: Tensor
    """(openings,) int64, the position after each."""


@dataclass(frozen=True)
class Generated:
    """An answer: its ids, and the log-probability of each."""

    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def append(self, token: int, score: float) -> None:
        self.ids.append(token)
        self.scores.append(score)


def unknown(continuations: Sequence[Continuations], answers: Sequence[Generated]) -> list[Continuations]:
    """Return the continuations of each question that are not its answer, whose scores are known."""
    return [
        [tokens for tokens in several if [*tokens] != answer.ids]
        for several, answer in zip(continuations, answers, strict=True)
    ]


def with_known(
    continuations: Sequence[Continuations], answers: Sequence[Generated], scores: Sequence[list[list[float]]]
) -> list[list[list[float]]]:
    """Return the scores of all continuations, from those of the `unknown` ones."""
    left = [iter(of_question) for of_question in scores]
    return [
        [answer.scores if [*tokens] == answer.ids else next(rest) for tokens in several]
        for several, answer, rest in zip(continuations, answers, left, strict=True)
    ]


@dataclass(frozen=True)
class Asked:
    """A batch of questions that were read, so that continuations of them can be scored.

    Attributes:
        openings: The openings that they follow.
        questions: In the batch's order.
        visible: (rows, positions) bool, false where the text after an opening is padded.
        caches: By layer, keys and values: first those of these positions, then those of the answer.
        logits: (rows, vocabulary) after the questions.
        answers: The answers to the questions that were answered.
    """

    openings: Openings
    questions: tuple[int, ...]
    visible: Tensor
    caches: list[KeysValues]
    logits: Tensor
    answers: dict[int, Generated] = field(default_factory=dict)


@dataclass
class Rows:
    """The state of a batch, which a step reads and changes in place.

    Attributes:
        ids: (rows, 1) int64, the newest token.
        scores: (rows, 1) float32, its log-probability.
        positions: (rows, 1) int64, its position in the row.
        visible: (rows, opening's + suffix positions) bool.
        cache: Keys and values; its `slots` holds the newest token's.
    """

    ids: Tensor
    scores: Tensor
    positions: Tensor
    visible: Tensor
    cache: SharedCache

    @property
    def suffix(self) -> int:
        """The number of positions of a row's suffix."""
        return int(self.cache.suffixes[0][0].shape[2])

    @property
    def before(self) -> int:
        """The number of positions of the openings."""
        return self.visible.shape[1] - self.suffix

    def select(self, indices: Sequence[int]) -> Rows:
        """Return some of the rows; the openings do not change."""
        rows = torch.tensor(indices, device=self.ids.device)
        cache = self.cache
        group = cache.group[rows]
        positions, members = membership(group.tolist(), len(cache.members))
        suffixes = [(keys[rows], values[rows]) for keys, values in cache.suffixes]
        chosen = SharedCache(
            cache.openings, suffixes, group, positions.to(rows.device), members.to(rows.device), cache.slots
        )
        return Rows(self.ids[rows], self.scores[rows], self.positions[rows], self.visible[rows], chosen)
