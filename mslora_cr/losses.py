"""The two penalties between LoRA banks: values and closed-form gradients, pure functions of matrices.

Both are separable by matrix, so neither needs an autograd graph, and matrices of one shape are batched. Each formula
needs the distances or the residual for its gradient, so that its value beside them costs next to nothing.

Source of the formulas: Zhang et al., "Contrastive Regularization over LoRA for Multimodal Biomedical Image
Incremental Learning", ACM MM 2025, as its published code computes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 1e-3
"""Squared distances below this share of ‖W‖² + ‖P‖² are computed from the difference itself: there the expansion
‖W‖² + ‖P‖² - 2⟨W, P⟩ loses more than four digits of float32."""


class Penalty(NamedTuple):
    """A penalty's value and its gradient with respect to the current bank's matrices."""

    value: Tensor
    gradient: Tensor


class Similarities(NamedTuple):
    """Σ_k exp(-‖W_k - P_ik‖) for each frozen bank i, of shape (banks,), and the gradient of the contrastive term."""

    sums: Tensor
    gradient: Tensor


def contrastive_term(
    current: Tensor, frozen: Tensor, frozen_squared: Tensor, same_modality: Tensor, matrices: int
) -> Similarities:
    """The share of a batch of equally shaped matrices in the contrastive term, without a graph.

    With ``s_i = (1/K) Σ_k exp(-‖W_k - P_ik‖_F)`` the term is ``Σ_i (1 - s_i if same modality else s_i)``, so that
    ``d term / dW_k = Σ_i ± exp(-d_ik) (W_k - P_ik) / (K d_ik)``, + for banks of the same modality, and zero where
    W = P. Frozen banks are read twice, for the distances and for the weighted sum: keep a batch small enough for the
    second time to come from the cache.

    Args:
        current: W, (n, D), float32 or float64; the n matrices flattened.
        frozen: P, (n, banks, D), the same dtype.
        frozen_squared: ‖P‖², (n, banks); constant, so the caller computes it once.
        same_modality: (banks,), bool.
        matrices: K, the number of matrices of a whole bank.

    Returns:
        ``sums`` (banks,) and ``gradient`` (n, D).

    Raises:
        ValueError: the shapes do not fit.
    """
    n, banks, size = frozen.shape
    if current.shape != (n, size) or frozen_squared.shape != (n, banks) or same_modality.shape != (banks,):
        raise ValueError(
            f"current {tuple(current.shape)}, frozen {tuple(frozen.shape)}, frozen_squared "
            f"{tuple(frozen_squared.shape)} and same_modality {tuple(same_modality.shape)} do not fit together"
        )
    row = current.unsqueeze(1)
    scale = current.square().sum(1, keepdim=True) + frozen_squared
    # A row times a matrix: the other way round, PyTorch's batched product on the CPU takes over ten times as long.
    squared = scale - 2 * torch.bmm(row, frozen.transpose(1, 2)).squeeze(1)
    near = squared < NEAR * scale
    some_near = bool(near.any())
    if some_near:
        rows, columns = near.nonzero(as_tuple=True)
        difference = current[rows] - frozen[rows, columns]
        squared[rows, columns] = difference.square().sum(1)

    distance = squared.sqrt()
    closeness = torch.exp(-distance)
    sign = torch.where(same_modality, 1.0, -1.0).to(current.dtype)
    weight = torch.where(distance > 0, closeness / distance, 0.0) * sign / matrices
    far = (weight.masked_fill(near, 0.0) if some_near else weight).unsqueeze(1)
    gradient = (row * far.sum(2, keepdim=True)).baddbmm_(far, frozen, alpha=-1).squeeze(1)
    if some_near:
        gradient.index_add_(0, rows, weight[rows, columns].unsqueeze(1) * difference)
    return Similarities(closeness.sum(0), gradient)


def contrastive_value(similarity: Tensor, same_modality: Tensor) -> Tensor:
    """``Σ_i (1 - s_i if same modality else s_i)`` from similarities s, (banks,), and flags, (banks,); a scalar."""
    return torch.where(same_modality, 1 - similarity, similarity).sum()


def orthogonality_term(matrices: Tensor, transposed: bool = False) -> Penalty:
    """``Σ_k ‖M_k M_kᵀ - I‖_F²`` over a batch of matrices, and its gradient ``4 (M Mᵀ - I) M``, without a graph.

    Args:
        matrices: M, (n, rank, m), as A is; or, if `transposed`, Mᵀ, (n, m, rank), as B is.

    Returns:
        A scalar and a gradient of the matrices' shape, neither divided by the number of pairs.
    """
    if matrices.dim() != 3:
        raise ValueError(f"expected three dimensions, (n, rank, m), found {tuple(matrices.shape)}")
    other = matrices.transpose(1, 2)
    residual = torch.bmm(other, matrices) if transposed else torch.bmm(matrices, other)
    residual.diagonal(dim1=1, dim2=2).sub_(1)
    flat = residual.flatten()
    value = torch.dot(flat, flat)
    residual *= 4
    return Penalty(value, torch.bmm(matrices, residual) if transposed else torch.bmm(residual, matrices))
