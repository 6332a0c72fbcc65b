"""KeepLoRA: a new bank outside the directions of the base model and earlier tasks, along its own task's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from mslora_cr.config.schema import PositiveInt, PositiveNumber, Section, StreamConfig
from mslora_cr.distributed.deepspeed import gather_params
from mslora_cr.methods.base import Method, Setup
from mslora_cr.methods.inflora import grown
from mslora_cr.utils.precision import ieee_float32

if TYPE_CHECKING:
    from mslora_cr.losses.penalty import Key, Pair
    from mslora_cr.training.passes import Passes

Gradients = Callable[[Mapping[str, "Pair"]], "dict[Key, Tensor]"]
"""Maps a bank to the gradient of each of its matrices."""


class KeeploraSettings(Section):
    """How many directions of the base and of earlier tasks are kept, and from how many samples."""

    weight_threshold: Annotated[PositiveNumber, Field(lt=1)] = 0.6
    """ε_w, the share of a weight's energy ‖W‖_F² that its principal directions hold; the published value."""
    threshold: Annotated[PositiveNumber, Field(lt=1)] = 0.95
    """ε_f, the share of the energy of a task's inputs that its directions hold."""
    samples: PositiveInt = 64
    """The number of samples of a task whose gradients and inputs are used."""
    tokens: PositiveInt = 16
    """The number of tokens of each sample whose inputs are used."""
    iterations: PositiveInt = 2
    """The iterations of the subspace iteration for the gradient's directions; each takes two passes over the
    samples."""


class Keeplora(Method[KeeploraSettings]):
    """Loss: cross entropy of the base with banks 1..t; of bank t only B is trained, and A is computed before.

    ``A_t = V_rᵀ``, where V_r are the first r right singular vectors of ``G (I - M Mᵀ)``. G, (out, in), is the gradient
    of the task's loss with respect to a layer's weight before the task. M's columns are an orthonormal basis of the
    principal right singular vectors of the base's weight and of the dominant inputs of earlier tasks. So ``A_t M = 0``.
    After the task M grows as in InfLoRA. All banks are summed for every question.

    Source: Luo et al., "KeepLoRA: Continual Learning with Residual Gradient Adaptation", ICLR 2026; ε_w = 0.6, frozen A
    and unscaled singular vectors as in its code. Here V_r comes from a subspace iteration on gradients of the bank's
    own matrices, ``dL/dB = s G Aᵀ`` at B = 0 and ``dL/dA = s Bᵀ G`` at A = 0, because G itself would be as large as the
    model.
    """

    name = "keeplora"
    section = KeeploraSettings
    banks_by = "all"
    keeps_frozen_adapters = True
    trained_halves = (1,)
    has_task_state = True

    def check(self, config: StreamConfig) -> None:
        if config.model.quantization is not None:
            raise ValueError(
                "model.quantization: keeplora reads the directions of the base's weights, which "
                "quantisation hides; leave it out"
            )

    def initial(self, setup: Setup, start: Mapping[str, Pair], passes: Passes) -> dict[str, Pair]:
        settings = self.settings(setup.config)
        bases = self._before(setup) or self._principal(setup, passes.weights())
        generator = torch.Generator().manual_seed(setup.config.seed + setup.task.index)
        drawn = {name: torch.randn(a.shape, generator=generator) for name, (a, _) in start.items()}
        directions = gradient_directions(
            lambda bank: passes.gradients_at(bank, settings.samples),
            {name: bases[name].to(setup.device) for name in drawn},
            {name: matrix.to(setup.device) for name, matrix in drawn.items()},
            {name: len(b) for name, (_, b) in start.items()},
            settings.iterations,
        )
        return {name: (directions[name].cpu(), torch.zeros(b.shape)) for name, (_, b) in start.items()}

    def task_state(self, setup: Setup, passes: Passes) -> dict[str, Tensor]:
        """Return M after this task: by layer, (in, directions)."""
        settings = self.settings(setup.config)
        seen = passes.layer_inputs(settings.samples, settings.tokens)
        bases = self._before(setup) or self._principal(setup, passes.weights())
        return {
            f"kept.{name}": grown(bases[name].to(setup.device), inputs.to(setup.device), settings.threshold)
            .cpu()
            .contiguous()
            for name, inputs in seen.items()
        }

    def _before(self, setup: Setup) -> dict[str, Tensor]:
        """Return M of the earlier tasks by layer, on the CPU; empty for a first task."""
        return {name.removeprefix("kept."): basis for name, basis in setup.state_before().items()}

    def _principal(self, setup: Setup, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return M for a first task: the principal directions of the base's weights. Called on every rank."""
        principal = {}
        for name, weight in weights.items():
            with gather_params([weight]):
                principal[name] = principal_inputs(weight.detach(), self.settings(setup.config).weight_threshold)
        return principal


def principal_inputs(weight: Tensor, threshold: float) -> Tensor:
    """Return the first right singular vectors, (in, m), of a weight, (out, in): as many as hold less than a share
    `threshold` of its energy, and at least one.
    """
    wide, w = weight.shape[0] <= weight.shape[1], weight.double()
    # The eigenvalues of the smaller side, in ascending order.
    energy, vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    count = max(1, int((energy.cumsum(0) < threshold * energy.sum()).sum()))
    if not wide:
        return vectors[:, :count].float()
    return ((w.T @ vectors[:, :count]) / energy[:count].sqrt()).float()


def gradient_directions(
    gradients: Gradients,
    bases: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor],
    outputs: Mapping[str, int],
    iterations: int,
) -> dict[str, Tensor]:
    """Return the first r right singular vectors of each layer's ``G (I - M Mᵀ)``, (r, in), by subspace iteration.

    Args:
        gradients: Maps a bank to its gradients.
        bases: M by layer, (in, m).
        drawn: Random starting vectors, (r, in).
        outputs: The number of outputs of each layer.
    """
    rows = {name: _outside(matrix, bases[name]) for name, matrix in drawn.items()}
    for _ in range(iterations):
        left = gradients({name: (a, a.new_zeros(outputs[name], len(a))) for name, a in rows.items()})
        columns = {name: torch.linalg.qr(left[name, 1].to(a.device)).Q for name, a in rows.items()}
        right = gradients({name: (torch.zeros_like(rows[name]), b) for name, b in columns.items()})
        products = {name: _outside(right[name, 0].to(a.device), bases[name]) for name, a in rows.items()}
        # These are the right singular vectors of Qᵀ G, and so of Q Qᵀ G, because Q's columns are orthonormal.
        rows = {name: torch.linalg.svd(product, full_matrices=False).Vh for name, product in products.items()}
    return {name: _outside(matrix, bases[name]) for name, matrix in rows.items()}


def _outside(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return the part of rows, (r, in), outside the span of `basis`'s orthonormal columns, (in, m)."""
    with ieee_float32():
        rest = matrix - (matrix @ basis) @ basis.T
        return rest - (rest @ basis) @ basis.T
