"""A bank's layer as one operation: ``y = x Wᵀ + Σ scaling · (x Aᵀ) Bᵀ`` over the adapters beside a frozen W.

PEFT's layer casts x to the adapter's dtype, which autocast reverts, scales the bank's output and adds it to the base's:
each step is a pass over all positions, and several copies of x are saved. Here x and x Aᵀ are saved once, B is scaled
instead of the output, and the sum is part of the matrix product. In float32 the result equals PEFT's up to rounding.
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
    """PEFT's LoRA layer with another forward pass; parameters, names and files are the same.

    PEFT's own forward pass runs if a term is not a plain product (dropout, routers), or if nothing is trained and the
    adapters have a higher precision than the base, as in answering with concatenated banks.
    """

    shared: SharedInput
    """The layers that read the same input, this one included; set by `fuse`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (…, in) to (…, out), in autocast's dtype if it is on, otherwise in the base weight's."""
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
        rows = _BankLinear.apply(x, product, self.base_layer.weight, self.base_layer.bias, scalings, *matrices)
        # Reshaped here, since autograd lets nobody change a view in place that such a function returned.
        result: Tensor = rows.view(*x.shape[:-1], rows.shape[-1])
        return result

    @property
    def adapters(self) -> list[str]:
        """The active adapters, in the order in which they were added. An adapter scaled by zero is left out, so that
        the others' result is bit for bit the one without it."""
        return [name for name in self.active_adapters if name in self.lora_A and self.scaling[name]]

    @property
    def plain(self) -> bool:
        """Whether the layer is a plain sum of products, with a frozen bias or none."""
        bias = self.base_layer.bias
        return (bias is None or not bias.requires_grad) and all(
            type(a) is nn.Linear and isinstance(self.lora_dropout[name], nn.Identity) for name, a in self.lora_A.items()
        )

    def parameters_read(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the forward pass reads from modules that it does not call, other layers
        included."""
        yield from self.base_layer.parameters(recurse=False)
        for layer in self.shared.layers:
            yield from (layer.lora_A[name].weight for name in layer.adapters)
        yield from (self.lora_B[name].weight for name in self.adapters)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base_layer.weight.dtype


class SharedInput:
    """The products x Aᵀ of all layers that read x, computed together by the first of them that is called."""

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        self.layers = list(layers)
        self._input: Tensor | None = None
        self._products: dict[int, Tensor] = {}
        """Products by the layer's id. Each product is taken once; a layer that is called again computes new ones."""

    @torch.no_grad()
    def product(self, layer: FusedLinear, x: Tensor) -> Tensor:
        """Return x Aᵀ of a layer, (positions, Σ rank), for x of shape (…, in). It has no graph: the layer's backward
        pass knows A.
        """
        if id(layer) not in self._products or not self._is_input(x):
            matrices = [[each.lora_A[name].weight for name in each.adapters] for each in self.layers]
            stacked = _stacked([matrix for group in matrices for matrix in group], x.dtype)
            ranks = [sum(len(matrix) for matrix in group) for group in matrices]
            parts = (x.flatten(0, -2) @ stacked.T).split(ranks, dim=1)
            self._products = dict(zip(map(id, self.layers), parts, strict=True))
            self._input = x  # x is held until all products are taken, so that no other tensor can get its address.
        product = self._products.pop(id(layer))
        if not self._products:
            self._input = None
        return product

    def _is_input(self, x: Tensor) -> bool:
        """Return whether both are the same memory; ZeRO-3 gives each layer an alias of its own."""
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
    by reference, not as saved tensors: ZeRO-3 releases their numbers after the forward pass and gathers them again
    before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scalings: Sequence[float],
        *matrices: Tensor,
    ) -> Tensor:
        """
        Args:
            x: (…, in), in the dtype to compute in.
            product: x Aᵀ, (positions, Σ rank).
            weight: (out, in), frozen.
            bias: (out,), frozen.
            scalings: One per adapter.
            matrices: Each adapter's A, then each adapter's B.

        Returns:
            (positions, out).
        """
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, product)
        ctx.weight, ctx.scalings, ctx.shape = weight, scalings, x.shape
        ctx.a, ctx.b = matrices[: len(scalings)], matrices[len(scalings) :]
        transposed = weight.to(x.dtype).T
        y = rows @ transposed if bias is None else torch.addmm(bias.to(x.dtype), rows, transposed)
        y.addmm_(product, _scaled(ctx.b, scalings, x.dtype).T)
        return y

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
        needed = ctx.needs_input_grad[5:]
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
        return dx, None, None, None, None, *da, *db


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the A matrices stacked, (Σ rank, in)."""
    return _joined([matrix.to(dtype) for matrix in matrices], dim=0)


def _scaled(matrices: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the B matrices side by side, (out, Σ rank), each times its scaling."""
    scaled = [b if scaling == 1 else b * scaling for b, scaling in zip(matrices, scalings, strict=True)]
    return _joined([b.to(dtype) for b in scaled], dim=1)


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim)


def fuse(model: nn.Module) -> None:
    """Tell the fused layers of a PEFT model which of them read the same input."""
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
    """Return the layers that compute as one operation."""
    return [module for module in model.modules() if isinstance(module, FusedLinear) and module.plain]
