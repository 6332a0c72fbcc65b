"""Computes in full float32 even where `training.tf32` rounds the model's products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute products on a GPU in full float32 inside the block.

    Small differences of large numbers need it, such as penalties, and so does what is computed once and kept, such as
    merged weights.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
