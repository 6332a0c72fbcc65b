"""Several continuations of one prompt in one row, and the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Continuations = Sequence[Sequence[int]]
"""Token sequences that may follow a prompt, each of at least one token."""
Beginning = tuple[int, ...]
"""The first tokens of a continuation."""


@dataclass(frozen=True)
class Branches:
    """The tokens to read in order to score some rows' continuations, padded on the right: the last token of each
    beginning, all but the whole. Continuations that begin alike share the tokens of what they have in common.

    Attributes:
        places: For each row, the position of each beginning.
        ids: (rows, positions) int64.
        depth: (rows, positions) int64, the index of each token in its continuation; −1 for padding.
        lineage: (rows, positions, positions) bool, whether a position sees another: itself and the tokens before it.
    """

    places: Sequence[dict[Beginning, int]]
    ids: Tensor
    depth: Tensor
    lineage: Tensor

    @staticmethod
    def positions(continuations: Continuations) -> int:
        """Return the number of tokens to read in order to score the continuations of one prompt."""
        return len(_beginnings(continuations))

    @classmethod
    def of(cls, continuations: Sequence[Continuations], padding: int, device: torch.device) -> Branches:
        places = [_beginnings(row) for row in continuations]
        length = max(map(len, places))
        ids = torch.full((len(places), length), padding)
        depth = torch.full((len(places), length), -1)
        lineage = torch.zeros(len(places), length, length, dtype=torch.bool)
        for row, of_row in enumerate(places):
            for beginning, place in of_row.items():
                ids[row, place], depth[row, place] = beginning[-1], len(beginning) - 1
                lineage[row, place, [of_row[beginning[:end]] for end in range(1, len(beginning) + 1)]] = True
        return cls(places, ids.to(device), depth.to(device), lineage.to(device))

    def seen(self, prompt: Tensor) -> Tensor:
        """(rows, positions, prompt + positions) bool: a token sees the prompt and its continuation up to itself.

        Args:
            prompt: (rows, prompt) bool, false for padding.
        """
        before = prompt[:, None].expand(-1, self.ids.shape[1], -1)
        return torch.cat([before, self.lineage], dim=2)

    def gather(self, logits: Tensor, continuations: Sequence[Continuations]) -> list[list[list[float]]]:
        """Return the log-probability of each token of each continuation of each row.

        Args:
            logits: (rows, 1 + positions, vocabulary) float32; the first are those after the prompt.
            continuations: By row.
        """
        wanted = [
            (row, 1 + places[beginning] if (beginning := tuple(tokens[:end])) else 0, tokens[end])
            for row, (places, several) in enumerate(zip(self.places, continuations, strict=True))
            for tokens in several
            for end in range(len(tokens))
        ]
        rows, positions, chosen = torch.tensor(wanted, device=logits.device).unbind(1)
        scores = iter((logits[rows, positions, chosen] - logits.logsumexp(-1)[rows, positions]).tolist())
        return [[[next(scores) for _ in tokens] for tokens in several] for several in continuations]


def _beginnings(continuations: Continuations) -> dict[Beginning, int]:
    """Return a position for each distinct beginning: one token or more of a continuation, without its last."""
    beginnings = dict.fromkeys(tuple(tokens[:end]) for tokens in continuations for end in range(1, len(tokens)))
    return {beginning: place for place, beginning in enumerate(beginnings)}
