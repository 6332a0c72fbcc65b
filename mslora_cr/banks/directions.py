"""Splits a bank into directions of unit length and their magnitudes, and trains magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mslora_cr.banks.bank import Bank, Matrices, product_norm
from mslora_cr.banks.io import PEFT_PREFIX
from mslora_cr.models.language import is_adapted


class ScaledParts(nn.Linear):
    """PEFT's A of several updates side by side, each scaled by a magnitude: ``m ⊙ A x``.

    The magnitudes belong to a module that is called, so that ZeRO-3 gathers them.
    """

    def __init__(self, plain: nn.Linear, magnitudes: Tensor) -> None:
        """
        Args:
            magnitudes: (parts,); equal slices of the rank.
        """
        weight = plain.weight
        super().__init__(plain.in_features, plain.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.weight = weight
        self.magnitudes = nn.Parameter(magnitudes.to(weight.device, weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, in) to (…, rank)."""
        return super().forward(input) * self.magnitudes.repeat_interleave(self.out_features // len(self.magnitudes))


def scale_parts(model: nn.Module, adapter: str, magnitudes: Mapping[str, Tensor]) -> None:
    """Scale an adapter's parts by magnitudes, by linear layer."""
    for name, module in model.named_modules():
        if is_adapted(module):
            magnitude = magnitudes[name.removeprefix(PEFT_PREFIX)]
            module.lora_A[adapter] = ScaledParts(module.lora_A[adapter], magnitude)


def magnitudes_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the magnitudes by linear layer; empty for an adapter whose parts are not scaled."""
    return {
        name.removeprefix(PEFT_PREFIX): module.lora_A[adapter].magnitudes
        for name, module in model.named_modules()
        if is_adapted(module) and adapter in module.lora_A and isinstance(module.lora_A[adapter], ScaledParts)
    }


def decoupled(bank: Bank, part: int) -> tuple[Bank, dict[str, Tensor]]:
    """Return a bank's parts, each of rank `part`, as directions ``s B_i A_i / ‖s B_i A_i‖_F``, and by layer their
    norms, (parts,).

    A norm has no sign, so a part with a negative magnitude gets the opposite direction.
    """
    matrices: Matrices = {}
    magnitudes = {}
    for name, (a, b) in bank.matrices.items():
        rows, columns = a.double().unflatten(0, (-1, part)), b.double().T.unflatten(0, (-1, part))
        norms = bank.scaling * product_norm(rows, columns.mT)
        unit = columns * (bank.scaling / norms.clamp(min=torch.finfo(torch.float32).tiny))[:, None, None]
        matrices[name], magnitudes[name] = (a, unit.flatten(0, 1).T.float().contiguous()), norms.float()
    return replace(bank, alpha=float(bank.rank), matrices=matrices), magnitudes


def coupled(directions: Bank, magnitudes: Mapping[str, Tensor], new: Bank) -> Bank:
    """Return one plain bank, the sum of directions times magnitudes and of the new bank. It has the new bank's scaling,
    and its rank is the sum of the ranks.
    """
    matrices = {}
    for name, (a, b) in new.matrices.items():
        normed, unit = directions.matrices[name]
        magnitude = magnitudes[name].repeat_interleave(len(normed) // len(magnitudes[name]))
        matrices[name] = (torch.cat([normed, a]), torch.cat([unit * (magnitude / new.scaling), b], dim=1))
    rank = directions.rank + new.rank
    return replace(new, rank=rank, alpha=new.scaling * rank, matrices=matrices)
