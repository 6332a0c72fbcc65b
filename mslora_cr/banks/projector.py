"""A base model's projector: a bank's numbers in it, or its own; and its training beside a bank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.banks.bank import Bank, BankError, only_projector
from mslora_cr.models.language import PROJECTOR, projector_of


class Projector:
    """The projector of a base model. Its own numbers are kept while a bank's are in their place.

    Attributes:
        learning_rate: The rate at which it is trained; None while it is frozen.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._pristine: dict[str, Tensor] = {}
        self._placed: Mapping[str, Tensor] | None = {}  # None while it is not known what is in place.
        self.learning_rate: float | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by name; empty if the model has no projector of LLaVA's name."""
        module = projector_of(self._base)
        return dict(module.named_parameters()) if module is not None else {}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Its parameters if they are trained."""
        return self.parameters if self.learning_rate is not None else {}

    def check(self, bank: Bank) -> None:
        """Refuse the projector of another base model.

        Raises:
            BankError: Its parameters have other names or shapes than this model's.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        if bank.projector and {name: tuple(tensor.shape) for name, tensor in bank.projector.items()} != shapes:
            raise BankError(
                f"bank {bank.name!r} has a projector of other layers or sizes than the {PROJECTOR} of "
                f"{type(self._base).__name__}"
            )

    def place(self, banks: Sequence[Bank]) -> None:
        """Put the projector of the bank that answers in place, or the model's own if it has none.

        Raises:
            BankError: A bank with a projector would answer together with others.
        """
        wanted = only_projector(banks)
        if wanted is self._placed or (not wanted and self._placed == {}):
            return
        if not self._pristine:
            self._pristine = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._placed = None
        self.load(wanted or self._pristine)
        self._placed = wanted

    @torch.no_grad()
    def load(self, numbers: Mapping[str, Tensor]) -> None:
        """Copy numbers into the parameters, in their dtype."""
        for name, parameter in self.parameters.items() if numbers else ():
            parameter.copy_(numbers[name])

    @contextmanager
    def own(self) -> Iterator[None]:
        """Put the model's own projector in place inside the block, for features that no bank may change."""
        before = self._placed
        self.load({} if before == {} else self._pristine)
        try:
            yield
        finally:
            self.load(before or {})

    def train(self, learning_rate: float) -> None:
        """Train the projector, in float32 whatever the model's dtype.

        A batch without a picture gives it a gradient of zero, as LLaVA's blank picture does, so that every process has
        a gradient for every parameter.

        Raises:
            BankError: The model has no projector of LLaVA's name.
        """
        module = projector_of(self._base)
        if module is None:
            raise BankError(f"{type(self._base).__name__} has no {PROJECTOR}, so a bank cannot train it")
        dtype = next(module.parameters()).dtype
        module.float().requires_grad_(True)
        module.register_forward_pre_hook(_in_its_dtype)
        module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        self._base.get_input_embeddings().register_forward_hook(self._take_part)
        self.learning_rate = learning_rate

    def _take_part(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        parameters = self.parameters.values()
        if not torch.is_grad_enabled() or any(hasattr(parameter, "ds_id") for parameter in parameters):
            return output  # ZeRO-3 has no whole parameter here; records without a picture are refused there.
        nothing = 0 * torch.stack([parameter.float().sum() for parameter in parameters]).sum()
        return output + nothing.to(output.dtype)


def _in_its_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Outside autocast, give the projector its input in the dtype of its numbers."""
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])
