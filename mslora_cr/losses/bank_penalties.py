"""The penalties between banks, as published or by cosine, computed in groups once per update."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.losses.contrastive import Frozen, PenaltyTerms, contrastive_value, penalty_terms
from mslora_cr.losses.cosine import cosine_terms
from mslora_cr.losses.penalty import Key, Pair
from mslora_cr.utils.precision import ieee_float32

GROUP_BYTES = {"cpu": 32_000_000, "cuda": 256_000_000}
"""Frozen float32 numbers that are processed at once: on the CPU as many as its last cache can hold, on a GPU enough to
keep the number of kernels small."""


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape, all A or all B, with their frozen counterparts, (n, banks, rows · columns), and those'
    squared norms. Without the contrastive term there are no counterparts."""

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

    Frozen banks are held once, as long as the task trains: 4 bytes (float32) or 2 (bfloat16) × banks × parameters of a
    bank. They are processed in groups that are small enough to be read from memory once per update.
    """

    def __init__(
        self,
        frozen: Sequence[Bank],
        same_modality: Sequence[bool],
        device: torch.device,
        frozen_dtype: torch.dtype = torch.float32,
        frozen_device: torch.device | None = None,
        contrastive: bool = True,
        cosine: bool = False,
    ) -> None:
        """
        Args:
            frozen: The earlier banks, at least one.
            same_modality: For each, whether its modality is that of the task.
            device: The device of the trainable bank, on which the penalties are computed.
            frozen_dtype: The dtype in which frozen banks are held; the arithmetic is always float32.
            frozen_device: Where frozen banks are held; `device` by default. CPU memory is pinned for a GPU.
            contrastive: False leaves the contrastive term out; it counts as zero, and no frozen bank is held.
            cosine: Use the contrastive term of `cosine_terms` instead of the published one.
        """
        assert frozen and len(frozen) == len(same_modality)
        self._device, self._dtype, self._contrastive, self._cosine = device, frozen_dtype, contrastive, cosine
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
    def terms(self, trainable: Mapping[str, Pair], alpha: float, beta: float) -> BankTerms:
        """Return the values of both terms, and the gradient of ``alpha · contrastive + beta · orthogonality``.

        Args:
            trainable: The trainable bank's matrices, of any dtype; computed in float32.
        """
        similarity_sum = torch.zeros(len(self._same), device=self._device)
        orthogonality = torch.as_tensor(self._frozen_orthogonality, device=self._device)
        coefficients = torch.where(self._same, alpha, -alpha).float() / self._matrices
        gradients: dict[Key, Tensor] = {}
        contrastive = similarity_sum.new_zeros(())
        with ieee_float32():
            for group in self._groups:
                current = torch.stack([trainable[module][half] for module, half in group.keys]).float()
                terms = self._group_terms(current, group, coefficients, beta / self._pairs)
                if terms.similarity_sum is not None:
                    similarity_sum += terms.similarity_sum
                orthogonality = orthogonality + terms.orthogonality
                gradients.update(zip(group.keys, terms.gradient, strict=True))
        if self._contrastive:
            contrastive = contrastive_value(similarity_sum / self._matrices, self._same)
        return BankTerms(contrastive, orthogonality / self._pairs, gradients)

    def _group_terms(self, current: Tensor, group: _Group, coefficients: Tensor, beta: float) -> PenaltyTerms:
        frozen = self._frozen(group, coefficients)
        if frozen is None or not self._cosine:
            return penalty_terms(current, frozen, beta, group.transposed)
        similarity_sum, gradient = cosine_terms(current.flatten(1), frozen)
        alone = penalty_terms(current, None, beta, group.transposed)
        return PenaltyTerms(similarity_sum, alone.orthogonality, alone.gradient + gradient.view_as(current))

    def _frozen(self, group: _Group, coefficients: Tensor) -> Frozen | None:
        if group.frozen is None or group.frozen_squared is None:
            return None
        matrices = group.frozen.to(self._device, torch.float32, non_blocking=True)
        return Frozen(matrices, group.frozen_squared, coefficients)


def _groups(bank: Bank, limit: int) -> list[list[Key]]:
    """Return the matrices of a bank by role and shape, in groups of at most `limit` bytes in float32, or of one
    matrix."""
    shapes: dict[tuple[int, torch.Size], list[Key]] = {}
    for module, pair in bank.matrices.items():
        for half, matrix in enumerate(pair):
            shapes.setdefault((half, matrix.shape), []).append((module, half))
    groups = []
    for (_, shape), keys in shapes.items():
        most = max(1, limit // (4 * shape.numel()))
        groups += [keys[start : start + most] for start in range(0, len(keys), most)]
    return groups
