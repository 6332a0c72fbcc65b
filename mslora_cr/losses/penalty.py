"""Interfaces of the terms that are added to the cross entropy: penalties, distillation, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mslora_cr.config.schema import LEARNABLE

Pair = tuple[Tensor, Tensor]
Key = tuple[str, int]
"""A matrix of a bank: its linear layer's name, and 0 for A or 1 for B."""
INITIAL_LOG_WEIGHT = -4.6
"""Where a learnable weight exp(a) starts, as published."""


class PenaltyStep(NamedTuple):
    """A penalty at the trainable bank's matrices."""

    value: Tensor
    """A scalar that is added to the loss."""
    gradients: dict[Key, Tensor]
    """Its gradient, matrix by matrix, float32."""
    logged: dict[str, Tensor]
    """Values for the log: terms before weighting, and their weights."""


class Penalty:
    """A term of the trainable bank alone. It needs no graph, so it is the same under DDP and every ZeRO stage."""

    def step(self, trainable: Mapping[str, Pair], learning_rate: float) -> PenaltyStep:
        """Take whole matrices once per optimizer step; the penalty updates its own learned values here."""
        raise NotImplementedError

    @property
    def weights(self) -> dict[str, float]:
        """The current weights, for the ledger."""
        return {}

    @property
    def frozen_bytes(self) -> int:
        """The memory of earlier banks' data, for the ledger."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return state for a checkpoint inside the task: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's `state_dict`."""


class Distillation(NamedTuple):
    """A term of each micro-batch's logits with the trainable bank (student) and without it (teacher)."""

    weight: float
    term: Callable[[Tensor, Tensor], Tensor]
    """Student's and teacher's logits at the labelled positions, (positions, vocabulary) → (positions,)."""


class PenaltyWeight:
    """A penalty's weight: fixed, or exp(a) with a learned by AdamW at the bank's learning rate.

    The value of a penalty is the same on every rank, so each rank updates its own a and they stay equal.
    """

    def __init__(self, setting: float) -> None:
        self._fixed = None if setting == LEARNABLE else setting
        self._log = torch.tensor(INITIAL_LOG_WEIGHT, dtype=torch.float64, requires_grad=True)
        self._optimizer = torch.optim.AdamW([self._log], weight_decay=0.0)

    @property
    def value(self) -> float:
        return self._log.detach().exp().item() if self._fixed is None else self._fixed

    def update(self, penalty: Tensor, learning_rate: float) -> None:
        """Take one step on ``exp(a) · penalty``; do nothing for a fixed weight."""
        if self._fixed is not None:
            return
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._log.grad = (self._log.detach().exp() * penalty.detach().cpu()).to(self._log.dtype)
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"log": self._log.detach(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._log.copy_(state["log"])
        self._optimizer.load_state_dict(state["optimizer"])


def penalty_hook(pending: dict[Key, Tensor], key: Key) -> Callable[[Tensor], Tensor]:
    """Add the pending gradient to a matrix's gradient.

    It must not refer to the trainer: the garbage collector does not see the references of PyTorch's hooks, and the
    trainer leads to the parameter, so the model would never be freed.
    """

    def add(gradient: Tensor) -> Tensor:
        penalty = pending.get(key)
        return gradient if penalty is None else gradient + penalty.to(gradient.dtype)

    return add
