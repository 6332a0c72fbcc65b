"""Several continuations of one prompt in one row, and the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Continuations = Sequence[Sequence[int]]
"""Token sequences that may follow a prompt, each of at least one token."""


@dataclass(frozen=True)
class Branches:
    """The tokens to read in order to score some rows' continuations: all but the last of each, padded on the right.

    Attributes:
        ids: (rows, positions) int64.
        branch: (rows, positions) int64, the continuation of each token; −1 for padding.
        depth: (rows, positions) int64, the index of each token in its continuation.
    """

    ids: Tensor
    branch: Tensor
    depth: Tensor

    @staticmethod
    def positions(continuations: Continuations) -> int:
        """Return the number of tokens to read in order to score the continuations of one prompt."""
        return sum(len(tokens) - 1 for tokens in continuations)

    @classmethod
    def of(cls, continuations: Sequence[Continuations], padding: int, device: torch.device) -> Branches:
        length = max(map(cls.positions, continuations))
        rows = [
            [(token, number, depth) for number, tokens in enumerate(row) for depth, token in enumerate(tokens[:-1])]
            for row in continuations
        ]
        padded = [row + [(padding, -1, 0)] * (length - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), length, 3)
        return cls(*table.unbind(-1))

    def seen(self, prompt: Tensor) -> Tensor:
        """(rows, prompt + positions, prompt + positions) bool: a token sees the prompt's tokens before it, and those of
        its own continuation up to itself.

        Args:
            prompt: (rows, prompt) bool, false for padding.
        """
        before = prompt.shape[1]
        total = before + self.ids.shape[1]
        seen = torch.zeros(len(prompt), total, total, dtype=torch.bool, device=prompt.device)
        seen[:, :, :before] = prompt[:, None]
        seen[:, :before, :before] &= torch.ones(before, before, dtype=torch.bool, device=prompt.device).tril()
        same = (self.branch[:, :, None] == self.branch[:, None]) & (self.branch >= 0)[:, None]
        seen[:, before:, before:] = same & (self.depth[:, :, None] >= self.depth[:, None])
        return seen

    def gather(self, logits: Tensor, continuations: Sequence[Continuations]) -> list[list[list[float]]]:
        """Return the log-probability of each token of each continuation of each row.

        Args:
            logits: (rows, 1 + positions, vocabulary) float32; the first are those after the prompt.
            continuations: By row.
        """
        normalizers = logits.logsumexp(-1)
        gathered = []
        for row, several in enumerate(continuations):
            start, scores = 1, []
            for tokens in several:
                positions = torch.tensor([0, *range(start, start + len(tokens) - 1)], device=logits.device)
                chosen = torch.tensor(list(tokens), device=logits.device)
                scores.append((logits[row, positions, chosen] - normalizers[row, positions]).tolist())
                start += len(tokens) - 1
            gathered.append(scores)
        return gathered
