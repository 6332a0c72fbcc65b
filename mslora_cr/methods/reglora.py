"""RegLoRA: a new bank that spares the entries of the weights that earlier tasks changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import NotNegative, PositiveNumber, Section, StreamConfig, Task
from mslora_cr.losses.penalty import Key, Pair, Penalty, PenaltyStep
from mslora_cr.methods.base import Method, Setup
from mslora_cr.utils.precision import ieee_float32


class RegloraSettings(Section):
    """Which entries RegLoRA protects, and how strongly. The defaults are the published values."""

    strength: NotNegative = 2500.0
    """λ, the weight of the penalty."""
    share: Annotated[PositiveNumber, Field(le=1)] = 0.02
    """The share of a layer's entries, those of largest absolute update, that are key elements of a task."""


class Reglora(Method[RegloraSettings]):
    """``CE + λ (1/L) Σ_layers (1/|K|) Σ_{(j,k) in K} |B_t A_t|_jk``

    K are a layer's key elements: the `share` of entries of largest ``|B_i A_i|`` of each earlier task i. An entry of
    several tasks counts as often. L is the number of layers. All banks are summed for every question.

    Source: Chen et al., "SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction
    Tuning", ICML 2025, as its code computes the term: means over entries and layers, of the product before LoRA's
    scaling, λ = 2500, share 2 %. Its other part, which rewrites training answers in several styles, changes the data
    and is not included.
    """

    name = "reglora"
    section = RegloraSettings
    banks_by = "all"
    keeps_frozen_adapters = True
    has_penalty = True

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        return task.index > 0 and self.settings(config).strength > 0

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty:
        return RegloraPenalty(frozen, self.settings(setup.config), setup.device)


class RegloraPenalty(Penalty):
    """Stores a layer's key elements as indices into its flattened update, int32: 4 bytes each."""

    def __init__(self, frozen: Sequence[Bank], settings: RegloraSettings, device: torch.device) -> None:
        self._strength = settings.strength
        self._keys = {
            name: torch.cat([key_elements(*bank.matrices[name], settings.share, device) for bank in frozen])
            for name in frozen[0].matrices
        }

    @property
    def frozen_bytes(self) -> int:
        return sum(keys.nbytes for keys in self._keys.values())

    def step(self, trainable: Mapping[str, Pair], learning_rate: float) -> PenaltyStep:
        means, gradients = [], dict[Key, Tensor]()
        for name, keys in self._keys.items():
            a, b = (matrix.detach().float() for matrix in trainable[name])
            with ieee_float32():
                update = b @ a
                entries = update.flatten()[keys]
                means.append(entries.abs().mean())
                signs = torch.zeros_like(update).flatten().index_add_(0, keys, entries.sign()).view_as(update)
                signs *= self._strength / len(self._keys) / len(keys)
                gradients[name, 0], gradients[name, 1] = b.T @ signs, signs @ a.T
        mean = torch.stack(means).mean()
        return PenaltyStep(self._strength * mean, gradients, {"key_elements": mean})


def key_elements(a: Tensor, b: Tensor, share: float, device: torch.device) -> Tensor:
    """Return indices, (k,) int32, of the share of entries of largest absolute value in the flattened update B A, (out,
    in).
    """
    with ieee_float32():
        update = (b.to(device) @ a.to(device)).abs().flatten()
    return update.topk(max(1, int(share * len(update)))).indices.int()
