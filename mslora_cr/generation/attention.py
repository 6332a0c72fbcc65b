"""Attention of many rows over openings that several of them share, and over each row's own suffix.

Keys and values of an opening (an image and the text before it) are held once, whatever the number of questions about
it, and are neither copied nor repeated for the heads that share them (grouped-query attention, Ainslie et al. 2023).
Queries of the rows that share an opening go into one product with its keys, as in Hydragen (Juravsky et al. 2024). One
softmax covers both parts, so nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

NAME = "shared_openings"
"""The name of this attention among transformers' attention implementations."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one decoder layer, (rows or openings, heads, positions, width) each."""


class _SuffixLayer(CacheLayerMixin):
    """One layer's keys and values of the rows' suffixes, in a buffer of fixed size."""

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffers exist."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return int(self.slots[0])

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]


class SharedCache(Cache):
    """Keys and values of openings and of each row's suffix.

    Attributes:
        openings: By layer, (openings, heads, positions, width).
        suffixes: By layer, (rows, heads, positions, width).
        group: (rows,) the opening of each row.
        index_in_group: (rows,) the row's index among the rows of its opening.
        members: (openings, most rows of one) the rows of each opening, padded with row 0.
        slots: (new positions,) where the next keys and values go in a row's suffix; changed in place.
    """

    def __init__(
        self,
        openings: Sequence[KeysValues],
        suffixes: Sequence[KeysValues],
        group: Tensor,
        index_in_group: Tensor,
        members: Tensor,
        slots: Tensor,
    ) -> None:
        self.openings, self.group, self.index_in_group, self.members = openings, group, index_in_group, members
        self.suffixes, self.slots = suffixes, slots
        super().__init__(layers=[_SuffixLayer(keys, values, slots) for keys, values in suffixes])

    def by_opening(self, rows: Tensor) -> Tensor:
        """(rows, heads, n, width) → (openings, heads, most rows of one · n, width)."""
        return rows[self.members].transpose(1, 2).flatten(2, 3)

    def by_row(self, values: Tensor) -> Tensor:
        """Return the inverse of `by_opening`."""
        parts = values.unflatten(2, (self.members.shape[1], -1))
        return parts[self.group, :, self.index_in_group]


def membership(group: Sequence[int], openings: int) -> tuple[Tensor, Tensor]:
    """Return `index_in_group` and `members` of `SharedCache`, for the opening of each row."""
    members: list[list[int]] = [[] for _ in range(openings)]
    positions = []
    for row, number in enumerate(group):
        positions.append(len(members[number]))
        members[number].append(row)
    most = max(map(len, members))
    return torch.tensor(positions), torch.tensor([rows + [0] * (most - len(rows)) for rows in members])


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    shared: SharedCache,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q · [K_opening, K_suffix] · scaling) [V_opening, V_suffix], with the softmax in float32 as in
    transformers.

    Args:
        query: (rows, query heads, new positions, width).
        key: (rows, heads, suffix positions, width).
        value: As `key`.
        attention_mask: (rows, 1, new positions, opening's + suffix positions) bool, true where a position is seen.
        scaling: The factor of the scores.
        shared: The openings, and which rows share them.
        softcap: The bound of the scores, as in Gemma 2 (`softcap · tanh(score / softcap)`).

    Returns:
        (rows, new positions, query heads, width).
    """
    rows, query_heads, length, width = query.shape
    keys, values = shared.openings[int(module.layer_idx)]  # type: ignore[arg-type]  # to torch, any module's attribute
    grouped = query.reshape(rows, key.shape[1], -1, width)  # The query heads of one key head are adjacent.
    on_opening = shared.by_row(shared.by_opening(grouped) @ keys.transpose(2, 3))
    scores = torch.cat([on_opening, grouped @ key.transpose(2, 3)], dim=-1) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, query_heads, length, -1).masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype).view(*grouped.shape[:3], -1)
    on_opening_weights, on_suffix_weights = weights.split([keys.shape[2], key.shape[2]], dim=-1)
    output = shared.by_row(shared.by_opening(on_opening_weights) @ values) + on_suffix_weights @ value
    return output.view(rows, query_heads, length, width).transpose(1, 2), None


AttentionInterface.register(NAME, shared_attention)


@contextmanager
def sharing(language_model: PreTrainedModel) -> Iterator[None]:
    """Let the language model attend as `shared_attention` inside the block; call it with `shared`."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)
