"""O-LoRA: a new bank whose input directions are kept apart from those of the frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import NotNegative, Section, StreamConfig, Task
from mslora_cr.losses.penalty import Key, Pair, Penalty, PenaltyStep
from mslora_cr.methods.base import Method, Setup


class OloraSettings(Section):
    """Weights of O-LoRA's two terms, as its published scripts set them."""

    lambda_1: NotNegative = 0.5
    """Of Σ |A_old A_newᵀ|."""
    lambda_2: NotNegative = 0.0
    """Of the new bank's norm."""


class Olora(Method[OloraSettings]):
    """``CE + λ₁ Σ_{i<t} Σ_layers Σ_jk |A_i A_tᵀ|_jk + λ₂ Σ_W ‖W_t‖_F``, W over all A and B of the new bank.

    ``d/dA_t = λ₁ Σ_i sign(A_t A_iᵀ) A_i + λ₂ A_t / ‖A_t‖``, the last likewise for B (zero at W = 0).
    All banks are summed for every question.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023,
    as its published code computes it: absolute values where the paper's formula has squares, norms that are not
    squared, λ₁ = 0.5, and λ₂ = 0 but for some tasks.
    """

    name = "olora"
    section = OloraSettings
    banks_by = "all"
    keeps_frozen_adapters = True

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        settings = self.settings(config)
        return settings.lambda_2 > 0 or (task.index > 0 and settings.lambda_1 > 0)

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty:
        return OloraPenalty(frozen, self.settings(setup.config), setup.device)


class OloraPenalty(Penalty):
    """Holds the frozen A matrices of each layer on top of each other, (banks · rank, in) float32."""

    def __init__(self, frozen: Sequence[Bank], settings: OloraSettings, device: torch.device) -> None:
        self._settings = settings
        modules = frozen[0].matrices if frozen else ()
        self._frozen = {name: torch.cat([bank.matrices[name][0] for bank in frozen]).to(device) for name in modules}

    @property
    def frozen_bytes(self) -> int:
        return sum(matrices.nbytes for matrices in self._frozen.values())

    def step(self, trainable: Mapping[str, Pair], learning_rate: float) -> PenaltyStep:
        overlaps, norms, gradients = [], [], dict[Key, Tensor]()
        for name, pair in trainable.items():
            for half, matrix in enumerate(pair):
                matrix = matrix.detach().float()
                norm = matrix.norm()
                norms.append(norm)
                gradients[name, half] = self._settings.lambda_2 * matrix / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            if self._frozen:
                a, frozen = pair[0].detach().float(), self._frozen[name]
                overlap = a @ frozen.T
                overlaps.append(overlap.abs().sum())
                gradients[name, 0].addmm_(overlap.sign(), frozen, alpha=self._settings.lambda_1)
        norm, overlap = torch.stack(norms).sum(), torch.stack(overlaps or [torch.zeros_like(norms[0])]).sum()
        value = self._settings.lambda_1 * overlap + self._settings.lambda_2 * norm
        return PenaltyStep(value, gradients, {"overlap": overlap, "norm": norm})
