"""O-LoRA: a new bank whose input directions are kept apart from those of the frozen banks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import NotNegative, PositiveNumber, Section, StreamConfig, Task
from mslora_cr.losses.penalty import Key, Pair, Penalty, PenaltyStep
from mslora_cr.methods.base import Method, Setup

RELATIVE = 3.0
"""ρ, if neither weight of the first term is given."""


class OloraSettings(Section):
    """Weights of O-LoRA's two terms. λ₁ is either `lambda_1` or derived from `relative`, the default. A list has one
    weight for each task of the stream."""

    lambda_1: NotNegative | list[NotNegative] | None = None
    """The weight of Σ |A_old A_newᵀ|, whatever the size of the model; the published scripts use 0.5."""
    lambda_2: NotNegative | list[NotNegative] = 0.0
    """The weight of the new bank's norm."""
    relative: PositiveNumber | None = Field(
        default_factory=lambda given: RELATIVE if given.get("lambda_1") is None else None
    )
    """Replaces λ₁: the size of the first term between banks as they are initialised, whatever rank, width and
    number of banks; λ₁ is this over `fresh_overlap`. 3 where `lambda_1` is not given either."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in ("lambda_1", "relative")}

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}

    def lambda_1_of(self, task: Task, frozen: Sequence[Bank]) -> float:
        """Return the weight of the first term, which a task without frozen banks lacks."""
        if self.lambda_1 is not None:
            return _of(self.lambda_1, task)
        assert self.relative is not None
        return self.relative / fresh_overlap(frozen) if frozen else 0.0

    def lambda_2_of(self, task: Task) -> float:
        return _of(self.lambda_2, task)


def _of(weight: float | list[float], task: Task) -> float:
    return weight[task.index] if isinstance(weight, list) else weight


class Olora(Method[OloraSettings]):
    """``CE + λ₁ Σ_{i<t} Σ_layers Σ_jk |A_i A_tᵀ|_jk + λ₂ Σ_W ‖W_t‖_F``, W over all A and B of the new bank.

    ``d/dA_t = λ₁ Σ_i sign(A_t A_iᵀ) A_i + λ₂ A_t / ‖A_t‖``, the last likewise for B (zero at W = 0).
    All banks are summed for every question.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023,
    as its published code computes it: absolute values where the paper's formula has squares, norms that are not
    squared, and λ₂ = 0 but for some tasks. Its λ₁ is 0.5; here it is by default as large as the model asks for.
    """

    name = "olora"
    section = OloraSettings
    banks_by = "all"
    keeps_frozen_adapters = True
    has_penalty = True
    former_defaults = MappingProxyType({"lambda_1": 0.5, "relative": None})

    def check(self, config: StreamConfig) -> None:
        settings = self.settings(config)
        for key in ("lambda_1", "lambda_2"):
            weights = getattr(settings, key)
            if isinstance(weights, list) and len(weights) < len(config.tasks):
                raise ValueError(
                    f"olora.{key}: has {len(weights)} weights for {len(config.tasks)} tasks; give each one"
                )
        if settings.relative is not None and settings.lambda_1 is not None:
            raise ValueError("olora.relative: stands in place of olora.lambda_1; leave one of the two out")

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        settings = self.settings(config)
        overlaps = settings.lambda_1 is None or _of(settings.lambda_1, task) > 0
        return settings.lambda_2_of(task) > 0 or (task.index > 0 and overlaps)

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty:
        settings = self.settings(setup.config)
        lambda_1, lambda_2 = settings.lambda_1_of(setup.task, frozen), settings.lambda_2_of(setup.task)
        return OloraPenalty(frozen, lambda_1, lambda_2, setup.device)


def fresh_overlap(frozen: Sequence[Bank]) -> float:
    """Return ``Σ_{i<t} Σ_layers r² √(2/π) / (3 √in)``: the first term's mean between banks as they are initialised.

    Entries of A are uniform with variance 1 / (3 in), so a product's variance is 1 / (9 in), and by the central limit
    theorem its mean absolute value √(2/π) / (3 √in).
    """
    return sum(
        bank.rank**2 * math.sqrt(2 / math.pi) / (3 * math.sqrt(a.shape[1]))
        for bank in frozen
        for a, _ in bank.matrices.values()
    )


class OloraPenalty(Penalty):
    """Holds the frozen A matrices of each layer on top of each other, (banks · rank, in) float32."""

    def __init__(self, frozen: Sequence[Bank], lambda_1: float, lambda_2: float, device: torch.device) -> None:
        self._lambda_1, self._lambda_2 = lambda_1, lambda_2
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
                gradients[name, half] = self._lambda_2 * matrix / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            if self._frozen:
                a, frozen = pair[0].detach().float(), self._frozen[name]
                overlap = a @ frozen.T
                overlaps.append(overlap.abs().sum())
                gradients[name, 0].addmm_(overlap.sign(), frozen, alpha=self._lambda_1)
        norm, overlap = torch.stack(norms).sum(), torch.stack(overlaps or [torch.zeros_like(norms[0])]).sum()
        value = self._lambda_1 * overlap + self._lambda_2 * norm
        return PenaltyStep(value, gradients, {"overlap": overlap, "norm": norm})
