"""Computes the last decoder layer's MLP only at positions whose logits are asked for.

Only a position's own logits read its result of that MLP, so skipping other positions changes neither the loss nor a
gradient. In training, few of several hundred positions are labelled, which saves most of one layer: 2.5 % of the
arithmetic of LLaVA-Med's linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SparseMLP:
    """Hooks around an MLP, (batch, length, width) → the same shape, with zeros at skipped positions."""

    def __init__(self, mlp: nn.Module | None) -> None:
        """
        Args:
            mlp: The MLP; None if a model's last one mixes positions, in which case nothing is skipped.
        """
        self._rows: Tensor | None = None
        self._shape = torch.Size()
        if mlp is not None:
            mlp.register_forward_pre_hook(self._gather)
            mlp.register_forward_hook(self._scatter)

    @contextmanager
    def masked(self, keep: Tensor) -> Iterator[None]:
        """Skip all positions but these inside the block.

        The backward pass belongs inside too, because gradient checkpointing computes the MLP again.

        Args:
            keep: (batch, length) bool.
        """
        self._rows = keep.flatten().nonzero().squeeze(1)
        try:
            yield
        finally:
            self._rows = None

    def _gather(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if self._rows is None:
            return None
        self._shape = inputs[0].shape
        return inputs[0].flatten(0, 1)[self._rows]

    def _scatter(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        whole = output.new_zeros(self._shape[0] * self._shape[1], self._shape[2])
        return whole.index_copy(0, self._rows, output).view(self._shape)
