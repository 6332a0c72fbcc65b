"""Elastic weight consolidation: one bank for the whole stream, held by quadratic penalties where earlier tasks need
it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import PositiveInt, PositiveNumber, Section, StreamConfig, Task
from mslora_cr.losses.penalty import Key, Pair, Penalty, PenaltyStep
from mslora_cr.methods.base import Method, Setup

if TYPE_CHECKING:
    from mslora_cr.training.passes import Passes


class EwcSettings(Section):
    """The strength of elastic weight consolidation, and how it estimates the Fisher information."""

    mode: Literal["online", "per_task"] = "online"
    """One anchor, the last task's, with the Fisher information of all tasks; or an anchor for every earlier task."""
    strength: PositiveNumber = 400.0
    """λ, the weight of the penalty."""
    decay: Annotated[PositiveNumber, Field(le=1)] = 1.0
    """γ, the factor by which an online anchor's earlier Fisher information decays from task to task."""
    fisher_batches: PositiveInt = 16
    """The number of batches, of the task's size, over whose samples the Fisher information is averaged."""


class Ewc(Method[EwcSettings]):
    """``CE + λ/2 Σ_i Σ_j F_ij (θ_j - θ*_ij)²`` over earlier tasks i and all numbers θ of the bank.

    ``F_i = (1/N) Σ_n (d log p(answer_n) / dθ)²`` at θ*_i, the bank after task i, over N samples of the task. `online`
    has one anchor: ``F̃_t = γ F̃_{t-1} + F_t`` at θ*_t, and the penalty of task t+1 is ``λ/2 γ F̃_t``.

    Sources: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (a term per task);
    Schwarz et al., "Progress & Compress", ICML 2018 (online).
    """

    name = "ewc"
    section = EwcSettings
    init_from_previous = True
    has_penalty = True
    has_task_state = True

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        return task.index > 0

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty:
        settings, earlier = self.settings(setup.config), setup.config.stream[: setup.task.index]
        anchors = earlier[-1:] if settings.mode == "online" else earlier
        banks = ((setup.ledger.banks(setup.config, [task])[0], setup.ledger.task_state(task.name)) for task in anchors)
        return EwcPenalty(banks, settings.strength * (settings.decay if settings.mode == "online" else 1), setup.device)

    def task_state(self, setup: Setup, passes: Passes) -> dict[str, Tensor]:
        """Return the diagonal of the empirical Fisher information: squared gradients of single samples, averaged."""
        settings = self.settings(setup.config)
        samples = settings.fisher_batches * setup.task.batch_size
        squares = passes.mean_over_samples(torch.square, samples, label="Fisher information")
        fisher = {fisher_name(*key): values for key, values in squares.items()}
        if settings.mode == "online" and setup.task.index:
            before = setup.ledger.task_state(setup.config.stream[setup.task.index - 1].name)
            fisher = {name: settings.decay * before[name] + values for name, values in fisher.items()}
        return fisher


class EwcPenalty(Penalty):
    """All anchors as one: ``Σ_i F_i (θ - θ_i)² = F (θ - c)² + rest`` with F = Σ F_i and c = Σ F_i θ_i / F."""

    def __init__(self, anchors: Iterable[tuple[Bank, Mapping[str, Tensor]]], strength: float, device: torch.device):
        self._strength, self._rest = strength, torch.zeros((), device=device)
        self._fisher: dict[Key, Tensor] = {}
        self._centre: dict[Key, Tensor] = {}
        for bank, fisher in anchors:
            for name, pair in bank.matrices.items():
                for half, matrix in enumerate(pair):
                    self._add((name, half), matrix.to(device), fisher[fisher_name(name, half)].to(device))

    def _add(self, key: Key, matrix: Tensor, fisher: Tensor) -> None:
        before = self._fisher.get(key, torch.zeros_like(fisher))
        centre = self._centre.get(key, matrix)
        gain = torch.where(fisher > 0, fisher / (before + fisher), 0.0)
        self._rest += (before * gain * (matrix - centre).square()).sum()
        self._fisher[key], self._centre[key] = before + fisher, centre + gain * (matrix - centre)

    @property
    def frozen_bytes(self) -> int:
        return sum(numbers.nbytes for held in (self._fisher, self._centre) for numbers in held.values())

    def step(self, trainable: Mapping[str, Pair], learning_rate: float) -> PenaltyStep:
        total, gradients = self._rest, dict[Key, Tensor]()
        for key, fisher in self._fisher.items():
            away = trainable[key[0]][key[1]].detach().float() - self._centre[key]
            gradients[key] = self._strength * fisher * away
            total = total + (fisher * away.square()).sum()
        return PenaltyStep(self._strength / 2 * total, gradients, {"drift": total / 2})


def fisher_name(module: str, half: int) -> str:
    return f"fisher.{module}.{'AB'[half]}"
