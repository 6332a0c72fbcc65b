"""Several banks in one model at once, each row of a batch with banks of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mslora_cr.banks.bank import Bank, BankError, concatenated
from mslora_cr.banks.fit import check_fits
from mslora_cr.models.language import language_linears


class PerSampleAdapters:
    """Banks next to a base model that has none merged in: ``x Wᵀ + ((x Aᵀ) · m) Bᵀ`` at every linear layer.

    A and B hold all banks, one after the other; m is 1 for the ranks of the row's own banks and 0 elsewhere, so a row
    gets what it would get alone, whatever is next to it. The banks are held once, in the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, banks: Sequence[Bank]) -> None:
        """
        Args:
            model: the base, with no adapter and nothing merged; `remove` leaves it as it was.
            banks: at least one; rows choose them by position.

        Raises:
            BankError: a bank has routers, such banks cannot be summed; or it does not fit the model.
        """
        if any(bank.routers for bank in banks):
            raise BankError("a bank with routers cannot answer together with others")
        self._columns = torch.repeat_interleave(torch.arange(len(banks)), torch.tensor([bank.rank for bank in banks]))
        self._banks = len(banks)
        self._dtype = model.get_input_embeddings().weight.dtype  # a quantised layer's weight has none to compute in
        self._device = model.get_input_embeddings().weight.device
        self._masks: dict[int, Tensor] = {}
        self._mask: Tensor | None = None
        linears = language_linears(model)
        for bank in banks:
            check_fits(bank, linears, type(model).__name__)
        self._handles = [self._add(linear, *concatenated(name, banks)) for name, linear in linears.items()]

    @contextmanager
    def answering(self, banks: Sequence[Sequence[int]]) -> Iterator[QuestionBanks]:
        """What gives questions their banks, inside; outside no row has any, and a forward pass is an error.

        Args:
            banks: by question, those that answer it, by position.
        """
        try:
            yield QuestionBanks(self, banks)
        finally:
            self._mask = None

    def set_rows(self, rows: Sequence[Collection[int]]) -> None:
        """Give each row of the batches that follow its banks, by position."""
        chosen = torch.zeros(len(rows), self._banks)
        for row, banks in enumerate(rows):
            chosen[row, list(banks)] = 1
        mask = chosen[:, None, self._columns].to(self._device, self._dtype)
        # In the same place for as many rows: a recorded step reads it there.
        self._mask = self._masks.setdefault(len(rows), mask)
        self._mask.copy_(mask)

    def remove(self) -> None:
        """Take the banks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _add(self, linear: nn.Linear, a: Tensor, b: Tensor) -> RemovableHandle:
        a, b = (matrix.to(linear.weight.device, self._dtype) for matrix in (a, b))

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            assert self._mask is not None and len(self._mask) == len(output), "each row must choose its banks first"
            return output + (nn.functional.linear(inputs[0], a) * self._mask) @ b.T

        return linear.register_forward_hook(add)


@dataclass(frozen=True)
class QuestionBanks:
    """The banks that answer each question, by their place among those of `adapters`."""

    adapters: PerSampleAdapters
    banks: Sequence[Sequence[int]]

    def of(self, question: int) -> tuple[int, ...]:
        return tuple(self.banks[question])

    def choose(self, questions: Sequence[int]) -> None:
        """Give the rows of the batches that follow the banks of these questions."""
        self.adapters.set_rows([self.banks[question] for question in questions])
