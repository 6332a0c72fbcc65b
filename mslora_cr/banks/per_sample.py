"""Several banks in one model at once, where each row of a batch weighs them by itself."""

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
from mslora_cr.banks.projector import Projector
from mslora_cr.models.language import language_linears


class PerSampleAdapters:
    """Banks beside a base model into which none is merged: ``x Wᵀ + ((x Aᵀ) · m) Bᵀ`` at every linear layer.

    A and B hold the layer's banks one after the other, except those whose B is zero there; m is a row's weight of each
    bank, repeated for its ranks. A row's result does not depend on the rows beside it. The banks are held once, and so
    are the weights, in the model's dtype. The projector is the same for all rows: batches are made of questions whose
    banks have the same one (`QuestionBanks.projector`).
    """

    def __init__(self, model: PreTrainedModel, banks: Sequence[Bank]) -> None:
        """
        Args:
                model: The base, without adapters and merged banks; `remove` restores it.
                banks: At least one; rows weigh them in this order.

        Raises:
                BankError: A bank has routers, so it cannot be summed; or it does not fit the model.
        """
        if any(bank.routers for bank in banks):
            raise BankError("a bank with routers cannot answer together with others")
        self._banks = banks
        # A quantised layer's weight has no dtype to compute in.
        self._dtype = model.get_input_embeddings().weight.dtype
        self._columns: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        """By banks and device: a model may be split over several."""
        self._masks: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}
        self._rows = 0
        self._projector = Projector(model)
        linears = language_linears(model)
        for bank in banks:
            check_fits(bank, linears, type(model).__name__)
            self._projector.check(bank)
        self._handles = [handle for item in linears.items() if (handle := self._add(*item))]

    @contextmanager
    def answering(self, weights: Tensor) -> Iterator[QuestionBanks]:
        """Assign banks to the rows of batches inside the block; a forward pass outside it is an error.

        Args:
            weights: The weight of each bank for each question, (questions, banks).
        """
        try:
            yield QuestionBanks(self, weights)
        finally:
            self._rows = 0
            self._projector.place([])

    def set_rows(self, weights: Tensor) -> None:
        """Give each row of the following batches its weights, (rows, banks); 0 leaves a bank out.

        Raises:
            BankError: The banks of a row, or of two rows, have projectors that differ.
        """
        self._rows = len(weights)
        self._projector.place(self.together(weights))
        for (present, device), columns in self._columns.items():
            mask = weights[:, None, columns].to(device, self._dtype)
            # They stay at the same address for as many rows: a recorded step reads them there.
            self._masks.setdefault((present, device, self._rows), mask).copy_(mask)

    def together(self, weights: Tensor) -> Sequence[Bank]:
        """Return the banks with which any of these rows is answered, if one of them has a projector; otherwise none."""
        if not any(bank.projector for bank in self._banks):
            return []
        return [bank for bank, used in zip(self._banks, (weights != 0).any(0).tolist(), strict=True) if used]

    def remove(self) -> None:
        """Take the banks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, linear: nn.Linear) -> RemovableHandle | None:
        if ".experts." in name:
            raise BankError(f"{name} mixes tokens of several questions, so they cannot have banks of their own")
        present = tuple(index for index, bank in enumerate(self._banks) if bank.matrices[name][1].any())
        if not present:
            return None
        ranks = torch.tensor([self._banks[index].rank for index in present])
        device = linear.weight.device
        self._columns[present, device] = torch.repeat_interleave(torch.tensor(present), ranks)
        pair = concatenated(name, [self._banks[index] for index in present])
        a, b = (matrix.to(device, self._dtype) for matrix in pair)

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            assert self._rows, "each row must have its weights first"
            mask = self._masks[present, device, self._rows]
            if output.dim() == 2:  # Rows times positions: a mixture's shared expert sees tokens in this form.
                mask = mask[:, 0].repeat_interleave(len(output) // self._rows, 0)
            if len(mask) != len(output):
                raise BankError(f"{name} sees {tuple(output.shape)} for {self._rows} questions, so it cannot be routed")
            return output + (nn.functional.linear(inputs[0], a) * mask) @ b.T

        return linear.register_forward_hook(add)


def whole_banks(banks: Sequence[Sequence[int]], count: int) -> Tensor:
    """Return weights, (questions, count): for each question 1 at the numbers of the banks that answer, else 0."""
    weights = torch.zeros(len(banks), count)
    for row, columns in zip(weights, banks, strict=True):
        row[list(columns)] = 1
    return weights


@dataclass(frozen=True)
class QuestionBanks:
    """The weight of each bank of `adapters` for each question, (questions, banks)."""

    adapters: PerSampleAdapters
    weights: Tensor

    def of(self, question: int) -> tuple[float, ...]:
        """Return the banks of a question, to tell them from those of others."""
        return tuple(self.weights[question].tolist())

    def projector(self, question: int) -> tuple[str, ...]:
        """Tell questions with different projectors apart."""
        return tuple(bank.name for bank in self.adapters.together(self.weights[[question]]))

    def choose(self, questions: Sequence[int]) -> None:
        """Give the rows of the following batches the banks of these questions."""
        self.adapters.set_rows(self.weights[list(questions)])
