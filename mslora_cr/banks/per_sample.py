"""Several banks in one model at once, each row of a batch with weights of its own for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    A and B hold the layer's banks, one after the other, those whose B is zero there left out; m is a row's weight of
    each bank, repeated for its ranks. A row gets what it would get alone, whatever is next to it. The banks are held
    once, and the weights, in the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, banks: Sequence[Bank]) -> None:
        """
        Args:
            model: the base, with no adapter and nothing merged; `remove` leaves it as it was.
            banks: at least one; rows weigh them in this order.

        Raises:
            BankError: a bank has routers, such banks cannot be summed; or it does not fit the model.
        """
        if any(bank.routers for bank in banks):
            raise BankError("a bank with routers cannot answer together with others")
        self._banks = banks
        self._dtype = model.get_input_embeddings().weight.dtype  # a quantised layer's weight has none to compute in
        self._device = model.get_input_embeddings().weight.device
        self._columns: dict[tuple[int, ...], Tensor] = {}
        self._masks: dict[tuple[tuple[int, ...], int], Tensor] = {}
        self._rows = 0
        linears = language_linears(model)
        for bank in banks:
            check_fits(bank, linears, type(model).__name__)
        self._handles = [handle for item in linears.items() if (handle := self._add(*item))]

    @contextmanager
    def answering(self, weights: Tensor) -> Iterator[QuestionBanks]:
        """Assigns banks to the rows of a batch within the block; outside it a forward pass is an error.

        Args:
            weights: how much of each bank answers each question, (questions, banks).
        """
        try:
            yield QuestionBanks(self, weights)
        finally:
            self._rows = 0

    def set_rows(self, weights: Tensor) -> None:
        """Give each row of the batches that follow its weights, (rows, banks); 0 leaves a bank out."""
        self._rows = len(weights)
        for present, columns in self._columns.items():
            mask = weights[:, None, columns].to(self._device, self._dtype)
            # In the same place for as many rows: a recorded step reads it there.
            self._masks.setdefault((present, self._rows), mask).copy_(mask)

    def remove(self) -> None:
        """Take the banks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, linear: nn.Linear) -> RemovableHandle | None:
        if ".experts." in name:
            raise BankError(f"{name} sees tokens of several questions mixed, so that each cannot have its own bank")
        present = tuple(index for index, bank in enumerate(self._banks) if bank.matrices[name][1].any())
        if not present:
            return None
        ranks = torch.tensor([self._banks[index].rank for index in present])
        self._columns[present] = torch.repeat_interleave(torch.tensor(present), ranks)
        pair = concatenated(name, [self._banks[index] for index in present])
        a, b = (matrix.to(linear.weight.device, self._dtype) for matrix in pair)

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            assert self._rows, "each row must have its weights first"
            mask = self._masks[present, self._rows]
            if output.dim() == 2:  # rows times positions, as a mixture's shared expert sees them
                mask = mask[:, 0].repeat_interleave(len(output) // self._rows, 0)
            if len(mask) != len(output):
                raise BankError(f"{name} sees {tuple(output.shape)} for {self._rows} questions; it cannot be routed")
            return output + (nn.functional.linear(inputs[0], a) * mask) @ b.T

        return linear.register_forward_hook(add)


def whole_banks(banks: Sequence[Sequence[int]], count: int) -> Tensor:
    """Weights, (questions, count): for each question 1 for the places of the banks that answer it, else 0."""
    weights = torch.zeros(len(banks), count)
    for row, columns in zip(weights, banks, strict=True):
        row[list(columns)] = 1
    return weights


@dataclass(frozen=True)
class QuestionBanks:
    """How much of each bank of `adapters` answers each question, (questions, banks)."""

    adapters: PerSampleAdapters
    weights: Tensor

    def of(self, question: int) -> tuple[float, ...]:
        """The banks of a question, to tell apart those of others."""
        return tuple(self.weights[question].tolist())

    def choose(self, questions: Sequence[int]) -> None:
        """Give the rows of the batches that follow the banks of these questions."""
        self.adapters.set_rows(self.weights[list(questions)])
