"""Similarity and effective rank of banks, computed from their factors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.models.language import PROJECTOR
from mslora_cr.utils.regular import check_regular

_LINEAR_NAME = re.compile(r".*layers\.(\d+)\.\w+\.(\w+)")


def effective_rank(a: Tensor, b: Tensor) -> float:
    """``exp(-Σ p_i log p_i)``, where p_i are the singular values of B A over their sum: from 1 to the rank; 0 if B A is
    zero.

    Source: Roy and Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007. B A has the
    singular values of ``R_b R_aᵀ``, of shape (rank, rank), with ``B = Q_b R_b`` and ``Aᵀ = Q_a R_a``.

    Args:
        a: (rank, in).
        b: (out, rank).
    """
    right, left = (torch.linalg.qr(matrix.double(), mode="r").R for matrix in (a.T, b))
    singular = torch.linalg.svdvals(left @ right.T)
    if not singular.sum() > 0:
        return 0.0
    share = singular / singular.sum()
    return float(torch.exp(torch.special.entr(share).sum()))


def effective_ranks(bank: Bank) -> dict[str, float]:
    """Return the effective rank of a bank's update at every linear layer, by the layer's name."""
    return {name: effective_rank(a, b) for name, (a, b) in bank.matrices.items()}


def update_cosines(name: str, banks: Sequence[Bank]) -> Tensor:
    """``⟨B_t A_t, B_i A_i⟩ / (‖B_t A_t‖ ‖B_i A_i‖)`` of one linear layer for every two banks, (banks, banks).

    It is 1 if two banks change the layer alike, and 0 if their changes are orthogonal or one changes nothing. The
    products of factors, ``Σ (B_tᵀ B_i) ∘ (A_t A_iᵀ)``, have the size of the ranks; no update is ever formed.
    """
    a = torch.cat([bank.matrices[name][0] for bank in banks]).double()
    b = torch.cat([bank.matrices[name][1] for bank in banks], dim=1).double()
    inner = (a @ a.T) * (b.T @ b)
    owner = torch.repeat_interleave(torch.arange(len(banks)), torch.tensor([bank.rank for bank in banks]))
    member = torch.nn.functional.one_hot(owner).double()
    products = member.T @ inner @ member
    norms = products.diagonal().clamp(min=0).sqrt()
    return torch.nan_to_num(products / torch.outer(norms, norms))


def by_layer_and_module(values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return means over the linear layers of each decoder layer, and over those of each module, in the model's order.

    Args:
        values: By the name of a linear layer in transformers' model.
    """
    layers: dict[str, list[Tensor]] = {}
    modules: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        match = _LINEAR_NAME.fullmatch(name)
        assert match is not None, f"{name} is no linear layer of a decoder layer"
        layers.setdefault(match[1], []).append(value)
        modules.setdefault(match[2], []).append(value)
    by_layer, by_module = (
        {module: torch.stack(values).mean(0) for module, values in grouped.items()} for grouped in (layers, modules)
    )
    return by_layer, by_module


class Similarity(NamedTuple):
    """``values[t][i]``: the similarity of banks t and i, in (0, 1]; symmetric, 1 on the diagonal."""

    banks: tuple[str, ...]
    values: list[list[float]]


def bank_similarity(weights: Mapping[str, Path]) -> Similarity:
    """Return ``s_ti = (1/K) Σ_k exp(-‖W_t^k - W_i^k‖_F)`` for every two banks t, i.

    The K matrices W^k of a bank are A and B of each layer. They are read one by one, so that banks of any size fit into
    memory. Source: Zhang et al., "Contrastive Regularization over LoRA for Multimodal Biomedical Image Incremental
    Learning", ACM MM 2025.

    Raises:
        BankError: A bank cannot be read, or the banks do not hold the same matrices.
    """
    try:
        files = {name: safe_open(check_regular(path), framework="pt") for name, path in weights.items()}
    except (OSError, SafetensorError) as error:
        raise BankError(f"a bank cannot be read: {error}") from None
    shapes = {name: _shapes(file) for name, file in files.items()}
    first = next(iter(shapes.values()))
    for name, shape in shapes.items():
        if shape != first:
            raise BankError(f"{weights[name]} does not contain matrices of the same names and shapes as the first bank")
    total = torch.zeros(len(files), len(files), dtype=torch.float64)
    for key in first:
        stacked = torch.stack([file.get_tensor(key).double().flatten() for file in files.values()])
        total += torch.exp(-torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist"))
    return Similarity(tuple(weights), (total / len(first)).tolist())


def _shapes(file: safe_open) -> dict[str, list[int]]:
    """Return A and B of each layer; a mixture's routers and a projector are left out."""
    keys = file.keys()
    return {
        key: file.get_slice(key).get_shape()
        for key in keys
        if not key.endswith(".lora_router.weight") and f"{PROJECTOR}." not in key
    }
