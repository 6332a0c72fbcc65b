"""MSLoRA-CR: a new bank beside frozen ones, shaped by a contrastive and an orthogonality term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import RegularizationConfig, StreamConfig, Task
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.losses.penalty import Pair, Penalty, PenaltyStep, PenaltyWeight
from mslora_cr.methods.base import Method, Setup

TERMS = {"alpha": "contrastive", "beta": "orthogonality"}
"""The term of each weight, as the log names it."""


class MsloraCr(Method):
    """``CE + α Σ_{i<t} (1 - s_i if same modality else s_i) + β (1/L) Σ ‖A Aᵀ - I‖² + ‖Bᵀ B - I‖²``

    with ``s_i = (1/K) Σ_k exp(-‖W_t^k - W_i^k‖_F)``; `losses/contrastive.py` computes both terms. A weight of 0
    removes its term, -1 makes it learnable. As published, the first task's loss is cross entropy alone.

    Source: Zhang et al., "Contrastive Regularization over LoRA for Multimodal Biomedical Image Incremental Learning",
    ACM MM 2025.
    """

    name = "mslora_cr"
    keeps_frozen_adapters = True
    has_penalty = True

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        return task.index > 0 and (config.regularization.alpha != 0 or config.regularization.beta != 0)

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty:
        settings = setup.config.regularization
        terms = BankPenalties(
            frozen,
            setup.config.same_modality(setup.task),
            setup.device,
            getattr(torch, settings.frozen_dtype),
            torch.device("cpu") if settings.frozen_device == "cpu" else setup.device,
            contrastive=settings.alpha != 0,
            cosine=settings.distance == "cosine",
        )
        return WeightedPenalties(terms, settings)


class WeightedPenalties(Penalty):
    """Both terms with their weights, which may be learnable. A term of weight 0 is neither added nor logged."""

    def __init__(self, terms: BankPenalties, settings: RegularizationConfig) -> None:
        self._terms = terms
        given = {"alpha": settings.alpha, "beta": settings.beta}
        self._weights = {name: PenaltyWeight(weight) for name, weight in given.items() if weight != 0}

    @property
    def weights(self) -> dict[str, float]:
        return {name: weight.value for name, weight in self._weights.items()}

    @property
    def frozen_bytes(self) -> int:
        return self._terms.frozen_bytes

    def step(self, trainable: Mapping[str, Pair], learning_rate: float) -> PenaltyStep:
        weights = self.weights
        penalty = self._terms.terms(trainable, weights.get("alpha", 0.0), weights.get("beta", 0.0))
        terms = dict(zip(TERMS, (penalty.contrastive, penalty.orthogonality), strict=True))
        value, logged = torch.zeros_like(penalty.orthogonality), dict[str, torch.Tensor]()
        for name, weight in self._weights.items():
            term = terms[name]
            value = value + weights[name] * term
            logged |= {name: torch.tensor(weights[name], dtype=torch.float64), TERMS[name]: term}
            weight.update(term, learning_rate)
        return PenaltyStep(value, penalty.gradients, logged)

    def state_dict(self) -> dict[str, Any]:
        return {name: weight.state_dict() for name, weight in self._weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, weight in self._weights.items():
            weight.load_state_dict(state[name])
