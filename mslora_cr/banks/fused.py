"""A bank's layer as one operation: ``y = x Wᵀ + Σ scaling · (x Aᵀ) Bᵀ`` over the adapters next to a frozen W.

PEFT's layer takes x to the adapter's dtype and autocast takes it back, scales the bank's output and adds it to the
base's, each a pass over all positions, and saves several copies of x. Here x and x Aᵀ are saved once, B is scaled
instead of the output, and the sum is part of the matrix product. In float32 the numbers are PEFT's up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same input, in the order in which they are called."""


class FusedLinear(PeftLinear):
    """PEFT's LoRA layer with another forward pass: same parameters, names and files.

    It falls back to PEFT's own forward pass where a term is not a plain product (dropout, routers), and where nothing
    is trained and the adapters are held more exactly than the base, as in answering with concatenated banks.
    """

    shared: SharedInput
    """The layers that read this one's input, itself among them; set by `fuse`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, in) → (…, out), in autocast's dtype where it is on, in the base weight's otherwise."""
        adapters = self.adapters
        dtype = self._compute_dtype(x)
        if args or kwargs or self.disable_adapters or self.merged or not adapters or not self.plain:
            return super().forward(x, *args, **kwargs)
        if not self.training and any(self.lora_A[name].weight.dtype != dtype for name in adapters):
            return super().forward(x)
        x = x.to(dtype)
        matrices = [half[name].weight for half in (self.lora_A, self.lora_B) for name in adapters]
        scalings = [self.scaling[name] for name in adapters]
        product = self.shared.product(self, x)
        return _BankLinear.apply(x, product, self.base_layer.weight, scalings, *matrices)

    @property
    def adapters(self) -> list[str]:
        """The adapters that take part, in the order in which they are added; one that is scaled by zero does not, so
        that without it the others' numbers are to the bit what they are alone."""
        return [name for name in self.active_adapters if name in self.lora_A and self.scaling[name]]

    @property
    def plain(self) -> bool:
        """Whether the layer is nothing but a sum of products."""
        return self.base_layer.bias is None and all(
            type(a) is nn.Linear and isinstance(self.lora_dropout[name], nn.Identity) for name, a in self.lora_A.items()
        )

    def parameters_read(self) -> Iterator[nn.Parameter]:
        """The parameters that the forward pass reads: of modules that it does not call, other layers' among them."""
        yield self.base_layer.weight
        for layer in self.shared.layers:
            yield from (layer.lora_A[name].weight for name in layer.adapters)
        yield from (self.lora_B[name].weight for name in self.adapters)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base_layer.weight.dtype


class SharedInput:
    """The products x Aᵀ of all layers that read x, made at once by the first of them that is called."""

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        self.layers = list(layers)
        self._input: Tensor | None = None
        self._products: dict[int, Tensor] = {}
        """By the layer's id; each is taken once, so that a layer that comes again makes new ones."""

    @torch.no_grad()
    def product(self, layer: FusedLinear, x: Tensor) -> Tensor:
        """x Aᵀ of a layer, (positions, Σ rank), for x of shape (…, in). No graph: the layer's backward knows A."""
        if id(layer) not in self._products or not self._is_input(x):
            matrices = [[each.lora_A[name].weight for name in each.adapters] for each in self.layers]
            stacked = _stacked([matrix for group in matrices for matrix in group], x.dtype)
            ranks = [sum(len(matrix) for matrix in group) for group in matrices]
            parts = (x.flatten(0, -2) @ stacked.T).split(ranks, dim=1)
            self._products = dict(zip(map(id, self.layers), parts, strict=True))
            self._input = x  # held until all are taken, so that no other tensor can be in its place
        product = self._products.pop(id(layer))
        if not self._products:
            self._input = None
        return product

    def _is_input(self, x: Tensor) -> bool:
        """The same numbers in the same place; ZeRO-3 gives each layer an alias of its own."""
        held = self._input
        return held is not None and (held.data_ptr(), held.shape, held.stride(), held.dtype) == (
            x.data_ptr(),
            x.shape,
            x.stride(),
            x.dtype,
        )


class _BankLinear(torch.autograd.Function):
    """The layer's forward and backward pass.

    With ``g = scaling · dy B``: ``dx = dy W + g A``, ``dA = gᵀ x``, ``dB = scaling · dyᵀ (x Aᵀ)``. Parameters are kept
    by reference, not as saved tensors: ZeRO-3 takes their numbers away after the forward pass and brings them back
    before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Tensor, weight: Tensor, scalings: Sequence[float], *matrices: Tensor
    ) -> Tensor:
        """
        Args:
            x: (…, in), in the dtype to compute in.
            product: x Aᵀ, (positions, Σ rank).
            weight: (out, in), frozen.
            scalings: of each adapter.
            matrices: each adapter's A, then each adapter's B.
        """
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, product)
        ctx.weight, ctx.scalings, ctx.shape = weight, scalings, x.shape
        ctx.a, ctx.b = matrices[: len(scalings)], matrices[len(scalings) :]
        y = rows @ weight.to(x.dtype).T
        y.addmm_(product, _scaled(ctx.b, scalings, x.dtype).T)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, product = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        g = dy @ _scaled(ctx.b, ctx.scalings, x.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weight.to(x.dtype)
            dx.addmm_(g, _stacked(ctx.a, x.dtype))
            dx = dx.view(ctx.shape)
        ranks = [len(a) for a in ctx.a]
        needed = ctx.needs_input_grad[4:]
        da = [
            (part.T @ x).to(a.dtype) if need else None
            for a, part, need in zip(ctx.a, g.split(ranks, dim=1), needed, strict=False)
        ]
        db = [
            (dy.T @ part).to(b.dtype) * scaling if need else None
            for b, part, scaling, need in zip(
                ctx.b, product.split(ranks, dim=1), ctx.scalings, needed[len(ranks) :], strict=True
            )
        ]
        return dx, None, None, None, *da, *db


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A matrices on top of each other, (Σ rank, in)."""
    return _joined([matrix.to(dtype) for matrix in matrices], dim=0)


def _scaled(matrices: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """B matrices side by side, (out, Σ rank), each times its scaling."""
    scaled = [b if scaling == 1 else b * scaling for b, scaling in zip(matrices, scalings, strict=True)]
    return _joined([b.to(dtype) for b in scaled], dim=1)


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim)


def fuse(model: nn.Module) -> None:
    """Let the fused layers of a PEFT model know which of them read the same input."""
    for parent in model.modules():
        children = dict(parent.named_children())
        alone = {name: layer for name, layer in children.items() if isinstance(layer, FusedLinear)}
        for names in SAME_INPUT:
            shared = SharedInput([alone.pop(name) for name in names if name in alone])
            for layer in shared.layers:
                layer.shared = shared
        for layer in alone.values():
            layer.shared = SharedInput([layer])


def fused_layers(model: nn.Module) -> list[FusedLinear]:
    """The layers that are one operation."""
    return [module for module in model.modules() if isinstance(module, FusedLinear) and module.plain]
