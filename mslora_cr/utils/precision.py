"""Computes in full float32 even where `training.tf32` rounds the model's products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Inside, products on a GPU are computed in full float32.

    For what is the small difference of large numbers, as a penalty is, and for what is computed once and kept, as
    merged weights are.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
