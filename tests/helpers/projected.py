"""A method outside the package, for tests: what becomes of the gradient before the step is its own."""

import torch

from mslora_cr.methods.base import Method

KEPT = 1
"""Rows of A that learn."""


def rows(gradient):
    return torch.cat([gradient[:KEPT], torch.zeros_like(gradient[KEPT:])])


def mixed(gradient):
    """Dense and linear: a rotation of the columns, which no optimizer's step is alike with and without."""
    rank = gradient.shape[1]
    return gradient @ torch.linalg.qr(torch.arange(1.0, rank * rank + 1).view(rank, rank).sin()).Q


class Projected(Method):
    """A keeps all rows but the first, which starts as it is; B's gradient is rotated."""

    name = "projected"
    keeps_frozen_adapters = True

    def initial(self, setup, start, probe):
        return {name: (torch.full(a.shape, 0.1), torch.zeros(b.shape)) for name, (a, b) in start.items()}

    def projection(self, setup, layers):
        return {(name, half): (rows, mixed)[half] for name in layers for half in (0, 1)}


class Unprojected(Projected):
    """Starts alike, and learns all of it."""

    name = "unprojected"

    def projection(self, setup, layers):
        return None
