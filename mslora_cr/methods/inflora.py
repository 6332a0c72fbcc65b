"""InfLoRA: a new bank that acts only outside the span of earlier tasks' inputs."""

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
"""Singular values below this share of the inputs' norm count as rounding errors."""


class InfloraSettings(Section):
    """How precisely the inputs of earlier tasks are described, and from how many of them."""

    threshold: Annotated[PositiveNumber, Field(lt=1)] = 0.95
    """ε, the share of the energy of a task's inputs that its directions hold."""
    samples: PositiveInt = 64
    """The number of samples of a task whose inputs are used."""
    tokens: PositiveInt = 16
    """The number of tokens of each of them."""


class Inflora(Method[InfloraSettings]):
    """Loss: cross entropy of the base with banks 1..t; of bank t only B is trained, and A is computed before.

    ``A_t = U_rᵀ / √3``, where U_r are the first r left singular vectors of ``(I - M Mᵀ) H``. H, (in, n), are a layer's
    inputs on the new task, and M's columns an orthonormal basis of earlier tasks' inputs. So ``A_t M = 0``: the layer's
    output for those inputs does not change. After the task M grows by the fewest left singular vectors of ``(I - M Mᵀ)
    H'`` with which it holds ε of ‖H'‖_F², where H' are the inputs at that time (gradient projection memory). All banks
    are summed for every question.

    Source: Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024; M as in
    Saha et al., "Gradient Projection Memory for Continual Learning", ICLR 2021. √3 comes from the source's code: it
    makes rows as long as those of a Kaiming-uniform A. Two things differ. H is a sample of tokens instead of all of
    them, because a layer may have 14,336 inputs. And ε is the same for every task, whereas the source lets it grow with
    t / T: a stream here may be extended.
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
        """Return M after this task: by layer, (in, directions)."""
        settings = self.settings(setup.config)
        seen_now = passes.layer_inputs(settings.samples, settings.tokens)
        return {
            f"inputs.{name}": grown(basis, seen, settings.threshold).cpu().contiguous()
            for name, seen, basis in self._inputs_and_bases(setup, seen_now)
        }

    def _inputs_and_bases(self, setup: Setup, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each layer with its inputs on the new task and M of the earlier tasks, which has no column at first."""
        state = setup.state_before()
        for name, seen in inputs.items():
            basis = state.get(f"inputs.{name}", torch.zeros(len(seen), 0))
            yield name, seen.to(setup.device), basis.to(setup.device)


def outside(inputs: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors, (in, k), and singular values, (k,), of the part of the inputs, (in, n), outside the
    span of `basis`'s orthonormal columns, (in, m).
    """
    with ieee_float32():
        rest = inputs - basis @ (basis.T @ inputs)
        # The second pass removes what rounding has left; a small rest would show it.
        rest = rest - basis @ (basis.T @ rest)
    directions, energy, _ = torch.linalg.svd(rest, full_matrices=False)
    return directions, energy


def new_directions(inputs: Tensor, basis: Tensor, count: int) -> Tensor:
    """Return the first `count` directions, (in, count), of inputs outside `basis`; zeros if there are fewer."""
    directions, energy = outside(inputs, basis)
    there = energy > NOTHING * inputs.norm()
    padded = inputs.new_zeros(len(inputs), count)
    padded[:, : min(count, len(energy))] = (directions * there)[:, :count]
    return padded


def grown(basis: Tensor, inputs: Tensor, threshold: float) -> Tensor:
    """Return `basis`, (in, m), extended by the fewest directions with which it holds a share `threshold` of the inputs'
    energy ‖H‖_F².
    """
    directions, values = outside(inputs, basis)
    energy = values.double().square()
    total = inputs.double().square().sum()
    held = total - energy.sum() + energy.cumsum(0)
    more = int((held < threshold * total).sum()) + 1 if total - energy.sum() < threshold * total else 0
    return torch.cat([basis, directions[:, :more]], dim=1)
