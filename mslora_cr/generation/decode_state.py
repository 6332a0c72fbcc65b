"""The state of a batch: its openings, the questions that were read, and the rows that are being answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mslora_cr.generation.attention import KeysValues, SharedCache, membership
from mslora_cr.generation.batching import Wave


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
class Asked:
    """A batch of questions that were read, so that continuations of them can be scored.

    Attributes:
        openings: The openings that they follow.
        questions: In the batch's order.
        visible: (rows, positions) bool, false where the text after an opening is padded.
        caches: By layer, keys and values: first those of these positions, then those of the answer.
        logits: (rows, vocabulary) after the questions.
    """

    openings: Openings
    questions: tuple[int, ...]
    visible: Tensor
    caches: list[KeysValues]
    logits: Tensor


@dataclass
class Rows:
    """The state of a batch, which a step reads and changes in place.

    Attributes:
        ids: (rows, 1) int64, the newest token.
        positions: (rows, 1) int64, its position in the row.
        visible: (rows, opening's + suffix positions) bool.
        cache: Keys and values; its `slots` holds the newest token's.
    """

    ids: Tensor
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
        return Rows(self.ids[rows], self.positions[rows], self.visible[rows], chosen)
