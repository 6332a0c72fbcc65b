"""Fused kernels for a language model's small operations: RMSNorm, rotary positions, gated MLPs.

Liger Kernel (Hsu et al., 2024) makes one pass over the activations where PyTorch makes several. What a module computes
is found by trying it: it gets a kernel if the kernel's formula gives the module's own numbers for a random input. So
the modules of a language model decide which kernels it gets, and not its name. Liger's cross entropy and its models
stay off, because only labelled positions reach `lm_head` here.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

from mslora_cr.models.language import language_model

log = logging.getLogger(__name__)

ROTATION = "apply_rotary_pos_emb"
"""The function by which transformers' attention modules rotate queries and keys."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""The largest difference between a module and a formula, as a share of the numbers' spread, by dtype."""
TOLERANCE_16 = 0.05
_FUSED = "_mslora_cr_fused"
"""An attribute of the classes of modules that have a kernel."""
Computes = Callable[..., Any]


def use_kernels(model: PreTrainedModel, kernels: Literal["liger", "torch"]) -> Counter[str]:
    """Let a newly loaded model compute with these kernels; other models of the process are not affected.

    Returns:
        The number of modules that have a kernel now, by operation.

    Raises:
        ModuleNotFoundError: Liger is not installed.
    """
    counts: Counter[str] = Counter()
    if kernels == "torch":
        return counts
    # It warns about each backend for other hardware that it could not import.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    from liger_kernel.transformers import functional as liger

    language = language_model(model)
    classes: dict[Any, type[nn.Module]] = {}
    for module in language.modules():
        for operation, with_kernel in _OPERATIONS.items():
            key = operation, type(module), _settings(module)
            if key not in classes:
                classes[key] = with_kernel(module, liger)
            if classes[key] is not type(module):
                module.__class__ = classes[key]
                counts[operation] += 1
                break
    log.info("Liger's kernels: %s", ", ".join(f"{operation} ({count})" for operation, count in counts.items()))
    return counts


def used_kernels(model: nn.Module) -> Literal["liger", "torch"]:
    """Return the library that computes a model's small operations: Liger if any module has a kernel of it."""
    return "liger" if any(hasattr(type(module), _FUSED) for module in model.modules()) else "torch"


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the numbers and names that modules of one class may differ by, such as a norm's epsilon."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return tuple(sorted((name, value) for name, value in plain.items() if name != "layer_idx"))


# --- norms -----------------------------------------------------------------------------------------------------------


def _norm(module: nn.Module, liger: Any) -> type[nn.Module]:
    """Return a norm's class with Liger's kernel, or as it is. Gemma adds 1 to the weight and rounds later."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if shapes != {"weight": 1} or not isinstance(epsilon, float) or not _takes_one(module):
        return type(module)
    width = module.get_parameter("weight").shape[0]
    for offset, casting in ((0.0, "llama"), (1.0, "gemma")):

        def formula(x: Tensor, offset: float = offset) -> Tensor:
            normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
            return normed * (offset + module.get_parameter("weight").float())

        def forward(self: Any, x: Tensor, offset: float = offset, casting: str = casting) -> Any:
            # Not in place: a gradient may also belong to the residual beside a norm.
            return liger.liger_rms_norm(x, self.weight, epsilon, offset, casting, False)

        # Small inputs show the epsilon.
        if all(_agree(module, formula, width, scale) for scale in (1.0, epsilon**0.5)):
            return _with_forward(module, forward)
    return type(module)


# --- MLPs ------------------------------------------------------------------------------------------------------------


def _gated_mlp(module: nn.Module, liger: Any) -> type[nn.Module]:
    """Return the class of an MLP whose gate is a layer or the first half of one with Liger's kernel, or as it is."""
    parts = {name for name, part in module.named_children() if any(True for _ in part.parameters())}
    gate = next((gate for gate in _GATES if parts == {*gate, "down_proj"}), None)
    if gate is None or not _takes_one(module):
        return type(module)
    if any(isinstance(part, nn.Dropout) and part.p for part in module.children()):
        return type(module)
    halves, width = _GATES[gate], module.get_submodule(gate[0]).in_features
    kinds: tuple[tuple[Computes, Computes], ...] = (
        (silu, liger.liger_swiglu),
        (lambda x: gelu(x, approximate="tanh"), liger.liger_geglu),
    )
    for activation, fused in kinds:

        def formula(x: Tensor, activation: Computes = activation) -> Any:
            opened, up = halves(module, x)
            return module.get_submodule("down_proj")(activation(opened) * up)

        def forward(self: Any, x: Tensor, fused: Computes = fused) -> Any:
            return self.down_proj(fused(*halves(self, x)))

        if _agree(module, formula, int(width)):  # type: ignore[arg-type]  # of a linear layer
            return _with_forward(module, forward)
    return type(module)


_GATES: dict[tuple[str, ...], Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    ("gate_proj", "up_proj"): lambda mlp, x: (mlp.gate_proj(x), mlp.up_proj(x)),
    ("gate_up_proj",): lambda mlp, x: mlp.gate_up_proj(x).chunk(2, dim=-1),
}


# --- positions -------------------------------------------------------------------------------------------------------


def _rotation(module: nn.Module, liger: Any) -> type[nn.Module]:
    """Return an attention module's class whose `forward` finds Liger's rotation function, or as it is."""
    plain = type(module).forward
    rotate = plain.__globals__.get(ROTATION) if isinstance(plain, FunctionType) else None
    width = getattr(module, "head_dim", None)
    if rotate is None or ROTATION not in plain.__code__.co_names or not isinstance(width, int):
        return type(module)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, width, generator=generator) for heads in (4, 2))
    angles = torch.rand(2, 5, width // 2, generator=generator).repeat(1, 1, 2)
    try:
        ours, wanted = rotate(query, key, angles.cos(), angles.sin()), _rotated(query, key, angles)
    except _ODD:
        return type(module)
    if not all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, wanted, strict=True)):
        return type(module)

    def fused(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        if more or options or cos.dim() != 3:
            return rotate(query, key, cos, sin, *more, **options)
        return liger.liger_rope(query, key, cos, sin)

    names = {**plain.__globals__, ROTATION: fused}
    forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return _with_forward(module, forward)


def _rotated(query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate both: each pair of entries half a head apart (Su et al., "RoFormer", 2021)."""

    def of(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos()[:, None] + torch.cat([-second, first], dim=-1) * angles.sin()[:, None]

    return of(query), of(key)


_OPERATIONS = {"RMSNorm": _norm, "gated MLP": _gated_mlp, "rotary positions": _rotation}


# --- trying ----------------------------------------------------------------------------------------------------------

_ODD = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What a module or a function raises that does not take such an input."""


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


@torch.no_grad()
def _agree(module: nn.Module, formula: Callable[[Tensor], Tensor], width: int, scale: float = 1.0) -> bool:
    """Tell whether a module computes a formula, by a random input, (2, 3, width)."""
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(parameter.device, dtype) * scale
    try:
        ours, wanted = module(x).float(), formula(x).float()
    except _ODD:
        return False
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16)
    return bool(ours.shape == wanted.shape and (ours - wanted).abs().max() <= tolerance * wanted.std())


def _with_forward(module: nn.Module, forward: Computes) -> type[nn.Module]:
    kind = type(module)
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, _FUSED: True})
