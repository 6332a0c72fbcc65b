"""How large the gradients of the two penalties are, beside each other, on matrices as LoRA initialises them.

    python -m benchmarks.penalty_ratio

One earlier bank of another modality, α = 0.1 and β = 0.01 as published; the matrix A of one linear layer, drawn from
U(-1/√width, 1/√width) as PEFT draws it. Numbers of matrices cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from tabulate import tabulate

from mslora_cr.losses.contrastive import Frozen, penalty_terms
from mslora_cr.losses.cosine import cosine_terms

RANKS, WIDTHS = (8, 64), (1024, 4096, 14336)
ALPHA, BETA = 0.1, 0.01


def main() -> list[dict[str, Any]]:
    rows = [_row(rank, width) for rank in RANKS for width in WIDTHS]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))
    return rows


def _row(rank: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    current, other = ((torch.rand(1, rank, width, generator=generator) * 2 - 1) / width**0.5 for _ in range(2))
    flat = other.flatten(1).unsqueeze(1)
    frozen = Frozen(flat, flat.square().sum(2), torch.tensor([-ALPHA / 2]))  # K = 2: A and B of one layer
    orthogonality = penalty_terms(current, None, BETA / 2).gradient  # of two banks' pairs
    published = penalty_terms(current, frozen).gradient
    cosine = cosine_terms(current.flatten(1), frozen)[1]
    sizes = {name: float(found.norm()) for name, found in (("β", orthogonality), ("α", published), ("cos", cosine))}
    return {
        "rank": rank,
        "width": width,
        "distance": float((current - other).norm()),
        "exp(-distance)": float(torch.exp(-(current - other).norm())),
        "gradient of β": sizes["β"],
        "of α": sizes["α"],
        "β over α": sizes["β"] / sizes["α"],
        "β over α, cosine": sizes["β"] / sizes["cos"],
    }


if __name__ == "__main__":
    main()
