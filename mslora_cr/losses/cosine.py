"""A contrastive term by angle instead of distance: not the published one, and off by default.

The published similarity is ``exp(-‖W - P‖)``. The distance grows with the root of the rank (6.5 at rank 64), so that
the term's gradient vanishes against the orthogonality term's (`python -m benchmarks.penalty_ratio`). The angle between
two matrices does not depend on their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mslora_cr.losses.contrastive import Frozen


def cosine_terms(current: Tensor, frozen: Frozen) -> tuple[Tensor, Tensor]:
    """``Σ_k exp(cos(W_k, P_ik) - 1)`` for each frozen bank i, and the gradient of the weighted contrastive term.

    With ``c = ⟨W, P⟩ / (‖W‖ ‖P‖)`` the similarity is ``s = exp(c - 1)``, with the gradient
    ``s (P / ‖P‖ - c W / ‖W‖) / ‖W‖``; the term is ``Σ_i (1 - s_i if same modality else s_i)``, as the published one. A
    matrix of zeros, such as B before its first update, has no angle: its cosine counts as 0, without a gradient.

    Args:
        current: W, (n, D), each matrix flattened.
        frozen: P with its squares and coefficients, of the same dtype.

    Returns:
        The sums, (banks,), and the gradient, (n, D).

    Raises:
        ValueError: The shapes do not fit.
    """
    n, banks, size = frozen.matrices.shape
    if current.shape != (n, size) or frozen.squared.shape != (n, banks) or frozen.coefficients.shape != (banks,):
        raise ValueError(
            f"current {tuple(current.shape)} and frozen {tuple(frozen.matrices.shape)} do not fit together"
        )
    squared = current.square().sum(1, keepdim=True)
    norms = (squared * frozen.squared).sqrt()
    product = torch.bmm(current.unsqueeze(1), frozen.matrices.transpose(1, 2)).squeeze(1)
    nonzero = norms > 0
    cosine = torch.where(nonzero, product / norms, 0.0)
    similarity = torch.exp(cosine - 1)
    pull = torch.where(nonzero, frozen.coefficients * similarity, 0.0)
    across = torch.where(nonzero, pull / norms, 0.0)
    along = torch.where(squared > 0, (pull * cosine).sum(1, keepdim=True) / squared, 0.0)
    gradient = along * current - torch.bmm(across.unsqueeze(1), frozen.matrices).squeeze(1)
    return similarity.sum(0), gradient
