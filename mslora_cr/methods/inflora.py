"""InfLoRA: a new bank that can only act where earlier tasks' inputs are not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from mslora_cr.config.schema import PositiveInt, PositiveNumber, Section, StreamConfig
from mslora_cr.methods.base import Method, Setup
from mslora_cr.utils.precision import ieee_float32

if TYPE_CHECKING:
    from mslora_cr.losses.penalty import Pair
    from mslora_cr.training.passes import Passes


NOTHING = 1e-5
"""Singular values below this share of the inputs' norm are rounding."""


class InfloraSettings(Section):
    """How well the inputs of earlier tasks are kept, and from how many of them they are known."""

    threshold: Annotated[PositiveNumber, Field(lt=1)] = 0.95
    """ε, the share of the energy of a task's inputs that its directions hold."""
    samples: PositiveInt = 64
    """The number of samples of a task whose inputs are used."""
    tokens: PositiveInt = 16
    """Of each of them."""


class Inflora(Method[InfloraSettings]):
    """Loss: cross entropy of the base with banks 1..t; of bank t B alone is trained, and A is made before.

    ``A_t = U_rᵀ / √3`` with U_r the first r left singular vectors of ``(I - M Mᵀ) H``: H, (in, n), are a layer's inputs
    on the new task, and M's columns an orthonormal basis of earlier tasks' inputs. So ``A_t M = 0``: what those inputs
    lead to does not change. After the task M grows by the fewest left singular vectors of ``(I - M Mᵀ) H'`` with which
    it holds ε of ‖H'‖_F², H' the inputs then (gradient projection memory). All banks are summed for every question.

    Source: Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024; M as in
    Saha et al., "Gradient Projection Memory for Continual Learning", ICLR 2021. √3 is the source's code's: rows are as
    long as a Kaiming-uniform A's. Two things differ: H is a sample of tokens instead of all, as 14,336 inputs a layer
    ask for, and ε is the same for every task, where the source lets it grow with t / T: a stream here may be extended.
    """

    name = "inflora"
    section = InfloraSettings
    banks_by = "all"
    keeps_frozen_adapters = True
    trained_halves = (1,)
    has_task_state = True

    def check(self, config: StreamConfig) -> None:
        settings = self.settings(config)
        if settings.samples * settings.tokens < config.lora.rank:
            raise ValueError(
                f"inflora.samples: {settings.samples} × inflora.tokens {settings.tokens} are fewer inputs than "
                f"lora.rank {config.lora.rank}"
            )

    def initial(self, setup: Setup, start: Mapping[str, Pair], passes: Passes) -> dict[str, Pair]:
        settings, made = self.settings(setup.config), {}
        for name, seen, basis in self._inputs_and_bases(setup, passes.layer_inputs(settings.samples, settings.tokens)):
            a, b = start[name]
            made[name] = (new_directions(seen, basis, len(a)).T.cpu() / math.sqrt(3), torch.zeros_like(b, device="cpu"))
        return made

    def task_state(self, setup: Setup, passes: Passes) -> dict[str, Tensor]:
        """M after this task: by layer, (in, directions)."""
        settings = self.settings(setup.config)
        seen_now = passes.layer_inputs(settings.samples, settings.tokens)
        return {
            f"inputs.{name}": grown(basis, seen, settings.threshold).cpu().contiguous()
            for name, seen, basis in self._inputs_and_bases(setup, seen_now)
        }

    def _inputs_and_bases(self, setup: Setup, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each layer with its inputs on the new task and the M of those before, which has no column at first."""
        state = setup.state_before()
        for name, seen in inputs.items():
            basis = state.get(f"inputs.{name}", torch.zeros(len(seen), 0))
            yield name, seen.to(setup.device), basis.to(setup.device)


def outside(inputs: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors, (in, k), and values, (k,), of what inputs, (in, n), have outside the span of `basis`'s
    orthonormal columns, (in, m)."""
    with ieee_float32():
        rest = inputs - basis @ (basis.T @ inputs)
        rest = rest - basis @ (basis.T @ rest)  # once more: rounding leaves some of it, which a small rest would show
    directions, energy, _ = torch.linalg.svd(rest, full_matrices=False)
    return directions, energy


def new_directions(inputs: Tensor, basis: Tensor, count: int) -> Tensor:
    """The first `count` directions, (in, count), of inputs outside `basis`; zeros where there are fewer."""
    directions, energy = outside(inputs, basis)
    there = energy > NOTHING * inputs.norm()
    padded = inputs.new_zeros(len(inputs), count)
    padded[:, : min(count, len(energy))] = (directions * there)[:, :count]
    return padded


def grown(basis: Tensor, inputs: Tensor, threshold: float) -> Tensor:
    """`basis`, (in, m), with the fewest directions more that hold a share `threshold` of the inputs' energy ‖H‖_F²."""
    directions, values = outside(inputs, basis)
    energy = values.double().square()
    total = inputs.double().square().sum()
    held = total - energy.sum() + energy.cumsum(0)
    more = int((held < threshold * total).sum()) + 1 if total - energy.sum() < threshold * total else 0
    return torch.cat([basis, directions[:, :more]], dim=1)
