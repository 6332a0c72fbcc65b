"""A bank, the LoRA adapter of one task, in memory; and the sum of several banks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mslora_cr.utils.errors import UserError

MOST_RANK, MOST_ALPHA = 1 << 16, 1e9
Matrices = dict[str, tuple[Tensor, Tensor]]
"""Linear layer's name in transformers' model → (A of shape (rank, in), B of shape (out, rank))."""


class BankError(UserError):
    """A bank cannot be read, or does not fit the model or the other banks."""


@dataclass(frozen=True)
class Bank:
    """A task's LoRA: float32 matrices on the CPU that add ``alpha / rank · B A`` to each linear layer's weight.

    With routers it is a mixture of experts, which are equal slices of the rank: ``alpha / rank · B (g(x) ⊙ A x)``,
    where each slice is weighed by its expert's share in ``g(x) = softmax(router x)``. This depends on the input, so it
    cannot be merged.
    """

    name: str
    rank: int
    alpha: float
    matrices: Matrices
    metadata: dict[str, Any] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)
    """The router of each linear layer, (experts, in); empty for plain LoRA."""
    projector: dict[str, Tensor] = field(default_factory=dict)
    """The parameters of the projector that was trained with it, by their names in the projector; they replace the
    base model's. Empty if the projector stayed frozen."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def tensors(self) -> list[Tensor]:
        """All its numbers."""
        pairs = (matrix for pair in self.matrices.values() for matrix in pair)
        return [*pairs, *self.routers.values(), *(self.projector[name] for name in sorted(self.projector))]

    @property
    def experts(self) -> int:
        return next((len(router) for router in self.routers.values()), 1)

    @property
    def depends_on_input(self) -> bool:
        """Whether its update depends on the input. Such a bank can be neither summed nor merged."""
        return bool(self.routers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names of its layers and its numbers."""
        digest = hashlib.sha256()
        for name in [*self.matrices, *sorted(self.projector)]:
            digest.update(name.encode())
        for tensor in self.tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def check_shape(rank: Any, alpha: Any) -> tuple[int, float]:
    """Rank and alpha, if they can be those of a bank; otherwise ValueError."""
    whole, number = type(rank) is int, type(alpha) in (int, float)
    if not whole or not 1 <= rank <= MOST_RANK or not number or not 0 < alpha <= MOST_ALPHA:
        raise ValueError(f"rank {str(rank)[:20]} and alpha {str(alpha)[:20]} are not those of a bank")
    return rank, float(alpha)


def assemble_bank(
    path: Path,
    name: str,
    rank: int,
    alpha: float,
    halves: Mapping[str, Mapping[str, Tensor]],
    metadata: dict[str, Any],
    projector: Mapping[str, Tensor] | None = None,
) -> Bank:
    matrices: Matrices = {}
    routers = {}
    for module, pair in sorted(halves.items(), key=lambda item: _natural(item[0])):
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise BankError(f"{path}: {module} has no pair of matrices of rank {rank}")
        matrices[module] = (_numbers(path, module, a), _numbers(path, module, b))
        router = pair.get("router")
        if router is not None:
            if router.dim() != 2 or router.shape[1] != a.shape[1] or rank % router.shape[0]:
                raise BankError(f"{path}: {module} has no router of experts that share rank {rank} equally")
            routers[module] = _numbers(path, module, router)
    if not matrices:
        raise BankError(f"{path}: the bank is empty")
    if routers.keys() - matrices.keys() or (routers and len(routers) < len(matrices)):
        raise BankError(f"{path}: some of its layers have a router, but others have none")
    trained = {key: _numbers(path, f"the projector's {key}", tensor) for key, tensor in (projector or {}).items()}
    return Bank(name, rank, float(alpha), matrices, metadata, routers, trained)


def _numbers(path: Path, module: str, tensor: Tensor) -> Tensor:
    """Return a stored matrix in float32. Values that no training produces are refused."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise BankError(f"{path}: {module} has a matrix of {tensor.dtype}, not of floating-point numbers")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:  # A few bytes can pretend to be a huge matrix.
        raise BankError(f"{path}: {module} has a matrix of more numbers than the file holds")
    numbers = tensor.float()
    if not numbers.isfinite().all():
        raise BankError(f"{path}: {module} holds NaN or infinite numbers: it is damaged, or its training diverged")
    return numbers


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isascii() and part.isdecimal() and len(part) < 10 else (-1, part)
        for part in name.split(".")
    ]


def concatenated(name: str, banks: Iterable[Bank]) -> tuple[Tensor, Tensor]:
    """Return the scaled A matrices stacked, and the B matrices side by side: B A is the sum of the banks' updates."""
    pairs = [(bank.scaling * bank.matrices[name][0], bank.matrices[name][1]) for bank in banks]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def only_projector(banks: Sequence[Bank]) -> dict[str, Tensor]:
    """Return the projector of banks that answer together: that of the only one, or none.

    Raises:
        BankError: There are several banks, and one has a projector; projectors replace one another and have no sum.
    """
    trained = next((bank for bank in banks if bank.projector), None)
    if trained is None:
        return {}
    if len(banks) > 1:
        raise BankError(
            f"bank {trained.name!r} was trained together with the projector, so it answers alone: the projectors of "
            f"{len(banks)} banks cannot be summed"
        )
    return trained.projector


def sum_banks(banks: Sequence[Bank], name: str) -> Bank:
    """Return the sum of several banks as one bank, whose rank is the sum of their ranks and whose update is the sum of
    their updates.

    Args:
        banks: At least one, over the same layers.
        name: The name of the sum.

    Raises:
        BankError: There is no bank, one has routers, their layers differ, or one of several has a projector.
    """
    if not banks:
        raise BankError("no bank to sum; give at least one")
    for bank in banks:
        if bank.routers:
            raise BankError(f"bank {bank.name!r} is a mixture of experts, which depends on its input: it has no sum")
        if bank.matrices.keys() != banks[0].matrices.keys():
            raise BankError(f"banks {banks[0].name!r} and {bank.name!r} adapt different layers")
    rank = sum(bank.rank for bank in banks)
    matrices = {layer: concatenated(layer, banks) for layer in banks[0].matrices}
    metadata = {"sum_of": [bank.name for bank in banks]}
    return Bank(name, rank, float(rank), matrices, metadata, projector=only_projector(banks))


def describe(bank: Bank) -> dict[str, Any]:
    """Describe a bank: rank, layers, parameters, those of its projector, and the norm of its update ``alpha / rank · B
    A``."""
    norms = {name: bank.scaling * product_norm(a.double(), b.double()).item() for name, (a, b) in bank.matrices.items()}
    largest = max(norms, key=lambda name: norms[name])
    return {
        "name": bank.name,
        "rank": bank.rank,
        "alpha": bank.alpha,
        "experts": bank.experts,
        "linear_layers": len(bank.matrices),
        "parameters": sum(matrix.numel() for matrix in bank.tensors),
        "update_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
        "largest_update": {"layer": largest, "norm": norms[largest]},
        **({"projector": sum(tensor.numel() for tensor in bank.projector.values())} if bank.projector else {}),
        "metadata": bank.metadata,
    }


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``‖B A‖_F`` from matrices of the rank's size: ``‖B A‖² = tr(BᵀB AAᵀ)``.

    Args:
        a: (…, rank, in).
        b: (…, out, rank).

    Returns:
        (…,).
    """
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp(min=0).sqrt()
