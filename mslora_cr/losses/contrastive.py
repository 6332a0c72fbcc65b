"""The two penalties between LoRA banks: values and closed-form gradient, a pure function of matrices.

Both are separable by matrix, so neither needs an autograd graph, and matrices of one shape are batched. They are
computed together because they share their passes over memory, which is what they cost.

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


class Frozen(NamedTuple):
    """The frozen counterparts of n matrices in the earlier banks, for the contrastive term."""

    matrices: Tensor
    """P, (n, banks, D), each matrix flattened."""
    squared: Tensor
    """‖P‖², (n, banks); constant, so computed once."""
    coefficients: Tensor
    """(banks,): the term's weight over K, the number of matrices of a bank; negative where a bank's modality is not
    the current one's."""


class PenaltyTerms(NamedTuple):
    """Both penalties' shares of n matrices of one shape."""

    similarity_sum: Tensor | None
    """Σ_k exp(-‖W_k - P_ik‖_F) for each frozen bank i, (banks,); None without frozen banks."""
    orthogonality: Tensor
    """Σ_k ‖M_k M_kᵀ - I‖_F², a scalar."""
    gradient: Tensor
    """The gradient of the weighted sum of both terms, in the matrices' shape."""


def penalty_terms(
    current: Tensor, frozen: Frozen | None = None, beta: float = 0.0, transposed: bool = False
) -> PenaltyTerms:
    """Return both penalties of matrices of one shape, and the gradient of their weighted sum.

    With ``s_i = (1/K) Σ_k exp(-d_ik)``, ``d_ik = ‖W_k - P_ik‖_F``, the contrastive term is ``Σ_i (1 - s_i if same
    modality else s_i)``, hence ``d term / dW_k = Σ_i ± exp(-d_ik) (W_k - P_ik) / (K d_ik)``, + for banks of the same
    modality, and zero where W = P. The orthogonality term is ``Σ_k ‖M_k M_kᵀ - I‖_F²``, its gradient
    ``4 (M Mᵀ - I) M``. The factors of W in both are added up before W is read.

    Frozen banks are read twice, for the distances and for the weighted sum: keep a batch small enough for the second
    time to come from the cache.

    Args:
        current: W, float32 or float64: M itself, (n, rank, m), as A is; or, if `transposed`, Mᵀ, (n, m, rank), as B is.
        frozen: The frozen banks, of the same dtype; without them, the contrastive term is left out.
        beta: The orthogonality term's weight over the number of pairs (A, B) that it is averaged over.

    Raises:
        ValueError: The shapes do not fit.
    """
    if current.dim() != 3:
        raise ValueError(f"expected three dimensions, (n, rank, m), found {tuple(current.shape)}")
    across = current.transpose(1, 2)
    residual = torch.bmm(across, current) if transposed else torch.bmm(current, across)
    diagonal = residual.diagonal(dim1=1, dim2=2)
    squared = diagonal.sum(1, keepdim=True)
    diagonal.sub_(1)
    flat = residual.flatten()
    orthogonality = torch.dot(flat, flat)
    factor = residual.mul_(4 * beta)
    if frozen is None:
        gradient = torch.bmm(current, factor) if transposed else torch.bmm(factor, current)
        return PenaltyTerms(None, orthogonality, gradient)

    distance, near = _distances(current.flatten(1), squared, frozen)
    similarity_sum = torch.exp(-distance)
    weight = similarity_sum / distance * frozen.coefficients
    far = weight if near is None else weight.index_put(near, weight.new_zeros(()))
    diagonal.add_(far.sum(1, keepdim=True))
    gradient = torch.bmm(current, factor) if transposed else torch.bmm(factor, current)
    rows = gradient.flatten(1)
    rows.unsqueeze(1).baddbmm_(far.unsqueeze(1), frozen.matrices, alpha=-1)
    if near is not None:
        share = torch.where(distance[near] > 0, weight[near], 0.0)
        difference = current.flatten(1)[near[0]] - frozen.matrices[near]
        rows.index_add_(0, near[0], share.unsqueeze(1) * difference)
    return PenaltyTerms(similarity_sum.sum(0), orthogonality, gradient)


def _distances(current: Tensor, squared: Tensor, frozen: Frozen) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return ‖W_k - P_ik‖, (n, banks), and the indices (k, i) of pairs so close that only their difference is exact, if
    any.
    """
    n, banks, size = frozen.matrices.shape
    if current.shape != (n, size) or frozen.squared.shape != (n, banks) or frozen.coefficients.shape != (banks,):
        raise ValueError(
            f"current {tuple(current.shape)}, frozen {tuple(frozen.matrices.shape)}, their squares "
            f"{tuple(frozen.squared.shape)} and coefficients {tuple(frozen.coefficients.shape)} do not fit together"
        )
    scale = squared + frozen.squared
    # A row times a matrix: in the other order, PyTorch's batched product on the CPU takes over ten times as long.
    across = frozen.matrices.transpose(1, 2)
    distances = torch.baddbmm(scale.unsqueeze(1), current.unsqueeze(1), across, alpha=-2).squeeze(1)
    near = distances <= NEAR * scale  # This includes pairs that are both zero.
    if not near.any():
        return distances.sqrt_(), None
    rows, columns = near.nonzero(as_tuple=True)
    distances[rows, columns] = (current[rows] - frozen.matrices[rows, columns]).square().sum(1)
    return distances.sqrt_(), (rows, columns)


def contrastive_value(similarity: Tensor, same_modality: Tensor) -> Tensor:
    """Return ``Σ_i (1 - s_i if same modality else s_i)`` from similarities, (banks,), and flags, (banks,); a scalar."""
    return torch.where(same_modality, 1 - similarity, similarity).sum()
