"""What may join the cross entropy: the interface, and the two penalties between banks, batched and once per update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mslora_cr.banks import Bank
from mslora_cr.config import LEARNABLE
from mslora_cr.losses import Frozen, contrastive_value, penalty_terms
from mslora_cr.precision import ieee_float32

Pair = tuple[Tensor, Tensor]
Key = tuple[str, int]
"""A matrix of a bank: its linear layer's name, and 0 for A or 1 for B."""
GROUP_BYTES = {"cpu": 32_000_000, "cuda": 256_000_000}
"""Frozen float32 numbers that are worked on at once: on the CPU what its last cache may hold, on a GPU enough for its
kernels to be few."""
INITIAL_LOG_WEIGHT = -4.6
"""Where a learnable weight exp(a) starts, as published."""


class PenaltyStep(NamedTuple):
    """A penalty at the live bank's matrices."""

    value: Tensor
    """A scalar; what joins the loss."""
    gradients: dict[Key, Tensor]
    """Its gradient, matrix by matrix, float32."""
    logged: dict[str, Tensor]
    """What the log shows: terms before weighting, and their weights."""


class Penalty:
    """A term of the live bank's matrices alone. It needs no graph, so it is the same under DDP and every ZeRO stage."""

    def step(self, live: Mapping[str, Pair], learning_rate: float) -> PenaltyStep:
        """Called once per optimizer step, with whole matrices; what the penalty itself learns moves here."""
        raise NotImplementedError

    @property
    def weights(self) -> dict[str, float]:
        """Weights as they are now, for the ledger."""
        return {}

    @property
    def frozen_bytes(self) -> int:
        """Memory that what is kept of earlier banks takes, for the ledger."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint inside the task must hold, tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's `state_dict`."""


class Distillation(NamedTuple):
    """A term of each micro-batch's logits with the live bank (student) and without it (teacher)."""

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
        """One step on ``exp(a) · penalty``; nothing for a fixed weight."""
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


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape, all A or all B, with their frozen counterparts, (n, banks, rows · columns), and those'
    squared norms; without any where the contrastive term is left out."""

    keys: list[Key]
    frozen: Tensor | None = None
    frozen_squared: Tensor | None = None

    @property
    def transposed(self) -> bool:
        return self.keys[0][1] == 1


class BankTerms(NamedTuple):
    """Both penalties at a bank, scalars, and the gradient of their weighted sum, float32, matrix by matrix."""

    contrastive: Tensor
    orthogonality: Tensor
    gradients: dict[Key, Tensor]


class BankPenalties:
    """The contrastive and the orthogonality term of one task.

    Frozen banks are held once, for as long as the task trains: 4 bytes (float32) or 2 (bfloat16) × banks × parameters
    of a bank. They are visited group by group, each small enough to be read from memory once per update.
    """

    def __init__(
        self,
        frozen: Sequence[Bank],
        same_modality: Sequence[bool],
        device: torch.device,
        frozen_dtype: torch.dtype = torch.float32,
        frozen_device: torch.device | None = None,
        contrastive: bool = True,
    ) -> None:
        """
        Args:
            frozen: the earlier banks, at least one.
            same_modality: for each, whether its modality is the task's own.
            device: where the live bank is, and the penalties are computed.
            frozen_dtype: how frozen banks are held; the arithmetic is float32 whatever it is.
            frozen_device: where frozen banks are held, `device` if not given; the CPU's memory is pinned for a GPU.
            contrastive: false leaves the contrastive term out, which then counts as zero; no frozen bank is held.
        """
        assert frozen and len(frozen) == len(same_modality)
        self._device, self._dtype, self._contrastive = device, frozen_dtype, contrastive
        self._frozen_device = frozen_device or device
        self._same = torch.tensor(list(same_modality), device=device)
        self._matrices = 2 * len(frozen[0].matrices)
        self._pairs = len(frozen[0].matrices) * (len(frozen) + 1)
        limit = GROUP_BYTES.get(device.type, GROUP_BYTES["cuda"])
        groups = _groups(frozen[0], limit // len(frozen))
        self._groups = [self._group(keys, frozen) if contrastive else _Group(keys) for keys in groups]
        with ieee_float32():
            self._frozen_orthogonality = sum(
                penalty_terms(
                    bank.matrices[module][half][None].to(device, frozen_dtype).float(), transposed=half == 1
                ).orthogonality
                for bank in frozen
                for module, half in itertools.product(bank.matrices, (0, 1))
            )

    def _group(self, keys: list[Key], frozen: Sequence[Bank]) -> _Group:
        rows = [torch.stack([bank.matrices[module][half].flatten() for bank in frozen]) for module, half in keys]
        stacked = torch.stack(rows).to(self._dtype)
        squared = stacked.float().square().sum(2).to(self._device)
        if self._frozen_device.type == "cpu" and self._device.type == "cuda":
            stacked = stacked.pin_memory()
        return _Group(keys, stacked.to(self._frozen_device), squared)

    @property
    def frozen_bytes(self) -> int:
        """Memory that the frozen banks take."""
        return sum(group.frozen.nbytes for group in self._groups if group.frozen is not None)

    @torch.no_grad()
    def terms(self, live: Mapping[str, Pair], alpha: float, beta: float) -> BankTerms:
        """Values of both terms, and the gradient of ``alpha · contrastive + beta · orthogonality``.

        Args:
            live: the live bank's matrices; computed in float32 whatever their dtype.
        """
        closeness = torch.zeros(len(self._same), device=self._device)
        orthogonality = torch.as_tensor(self._frozen_orthogonality, device=self._device)
        pull = torch.where(self._same, alpha, -alpha).float() / self._matrices
        gradients: dict[Key, Tensor] = {}
        contrastive = closeness.new_zeros(())
        with ieee_float32():
            for group in self._groups:
                current = torch.stack([live[module][half] for module, half in group.keys]).float()
                found = penalty_terms(current, self._frozen(group, pull), beta / self._pairs, group.transposed)
                if found.closeness is not None:
                    closeness += found.closeness
                orthogonality = orthogonality + found.orthogonality
                gradients.update(zip(group.keys, found.gradient, strict=True))
        if self._contrastive:
            contrastive = contrastive_value(closeness / self._matrices, self._same)
        return BankTerms(contrastive, orthogonality / self._pairs, gradients)

    def _frozen(self, group: _Group, pull: Tensor) -> Frozen | None:
        if group.frozen is None or group.frozen_squared is None:
            return None
        matrices = group.frozen.to(self._device, torch.float32, non_blocking=True)
        return Frozen(matrices, group.frozen_squared, pull)


def _groups(bank: Bank, limit: int) -> list[list[Key]]:
    """The matrices of a bank by role and shape, in groups of at most `limit` bytes in float32 (or one matrix)."""
    shapes: dict[tuple[int, torch.Size], list[Key]] = {}
    for module, pair in bank.matrices.items():
        for half, matrix in enumerate(pair):
            shapes.setdefault((half, matrix.shape), []).append((module, half))
    found = []
    for (_, shape), keys in shapes.items():
        most = max(1, limit // (4 * shape.numel()))
        found += [keys[start : start + most] for start in range(0, len(keys), most)]
    return found
