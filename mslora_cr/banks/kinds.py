"""The kinds of adapters that can be trained as a bank; a method chooses one.

`PlainLora` trains A and B of each linear layer. The other kinds train more. A kind installs its adapter in a PEFT
model, says what is trained, reads and writes its numbers, and says what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mslora_cr.banks.bank import Bank, Matrices
from mslora_cr.banks.directions import coupled, decoupled, magnitudes_of, scale_parts
from mslora_cr.banks.experts import copy_routers, route, routers_of
from mslora_cr.banks.io import PEFT_PREFIX
from mslora_cr.models.language import is_adapted

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

GatherFn = Callable[[Tensor], Tensor]
"""Returns the whole value of a parameter; under DeepSpeed the model holds a part or a rounded copy of it."""


class PlainLora:
    """A and B of each linear layer, and nothing else. The other kinds add to it."""

    @property
    def description(self) -> str:
        """A description of a bank of this kind."""
        return "plain LoRA"

    def holds(self, bank: Bank) -> bool:
        """Return whether a stored bank is of this kind."""
        return not bank.routers

    def frozen_part(self, previous: Bank) -> Bank | None:
        """Return the bank to freeze beside the base if a task continues from the previous bank; None if it trains that
        bank's own numbers.
        """
        return None

    def install_frozen(self, model: nn.Module, frozen: str) -> None:
        """Turn the adapter that holds `frozen_part` into one of this kind."""

    def install(self, model: nn.Module, adapter: str, frozen: str) -> None:
        """Turn PEFT's new LoRA into an adapter of this kind.

        Args:
            adapter: The name of the new adapter.
            frozen: The name of the adapter that holds frozen banks, if there is one.
        """

    def extra_parameters(self, model: nn.Module, adapter: str, frozen: str) -> list[nn.Parameter]:
        """Return the trained parameters besides A and B."""
        return []

    def load(self, model: nn.Module, adapter: str, bank: Bank) -> None:
        """Copy a bank's numbers into an adapter.

        Raises:
            BankError: The bank is of another kind.
        """
        for name, layer in lora_layers(model):
            a, b = bank.matrices[name]
            layer.lora_A[adapter].weight.copy_(a)
            layer.lora_B[adapter].weight.copy_(b)
        copy_routers(model, adapter, bank.routers)

    def read(self, model: nn.Module, adapter: str, gather_fn: GatherFn) -> tuple[Matrices, dict[str, Tensor]]:
        """Return A and B by linear layer, and routers if the kind has any: float32, on the CPU."""
        matrices = {
            name: (copied(layer.lora_A[adapter].weight, gather_fn), copied(layer.lora_B[adapter].weight, gather_fn))
            for name, layer in lora_layers(model)
        }
        routers = {name: copied(router.weight, gather_fn) for name, router in routers_of(model, adapter).items()}
        return matrices, routers

    def extra_state(self, model: nn.Module, frozen: str, gather_fn: GatherFn) -> dict[str, Tensor]:
        """Return trained tensors that are not part of the bank that `read` returns; checkpoints inside a task store
        them.
        """
        return {}

    def load_extra_state(self, model: nn.Module, frozen: str, state: Mapping[str, Tensor]) -> None:
        """Restore a checkpoint's `extra_state`."""

    def stored(self, bank: Bank, extra_state: Mapping[str, Tensor]) -> Bank:
        """Return the bank that is stored for a task."""
        return bank


class Experts(PlainLora):
    """A mixture of LoRA experts: equal slices of the rank, weighed token by token by a trained router."""

    def __init__(self, experts: int) -> None:
        """
        Args:
            experts: The number of experts; it divides the rank.
        """
        self._experts = experts

    @property
    def description(self) -> str:
        return f"a mixture of {self._experts} experts"

    def holds(self, bank: Bank) -> bool:
        return bool(bank.routers) and bank.experts == self._experts

    def install(self, model: nn.Module, adapter: str, frozen: str) -> None:
        route(model, adapter, self._experts)

    def extra_parameters(self, model: nn.Module, adapter: str, frozen: str) -> list[nn.Parameter]:
        return list(nn.ModuleList(routers_of(model, adapter).values()).parameters())


class ScaledDirections(PlainLora):
    """Earlier updates with frozen directions and trained magnitudes, and a plain LoRA for the new task.

    All of them are stored together as one plain bank, whose rank grows with every task.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._directions: Bank | None = None
        self._magnitudes: dict[str, Tensor] = {}

    def frozen_part(self, previous: Bank) -> Bank:
        self._directions, self._magnitudes = decoupled(previous, self._rank)
        return self._directions

    def install_frozen(self, model: nn.Module, frozen: str) -> None:
        scale_parts(model, frozen, self._magnitudes)

    def install(self, model: nn.Module, adapter: str, frozen: str) -> None:
        for magnitudes in magnitudes_of(model, frozen).values():
            magnitudes.requires_grad_(True)

    def extra_parameters(self, model: nn.Module, adapter: str, frozen: str) -> list[nn.Parameter]:
        return list(magnitudes_of(model, frozen).values())

    def extra_state(self, model: nn.Module, frozen: str, gather_fn: GatherFn) -> dict[str, Tensor]:
        trained = magnitudes_of(model, frozen)
        return {name: copied(magnitudes, gather_fn) for name, magnitudes in trained.items()}

    def load_extra_state(self, model: nn.Module, frozen: str, state: Mapping[str, Tensor]) -> None:
        for name, magnitudes in state.items():
            magnitudes_of(model, frozen)[name].copy_(magnitudes)

    def stored(self, bank: Bank, extra_state: Mapping[str, Tensor]) -> Bank:
        return bank if self._directions is None else coupled(self._directions, extra_state, bank)


def kind_of(bank: Bank) -> PlainLora:
    """Return the kind of a stored bank, to answer with it."""
    return Experts(bank.experts) if bank.routers else PlainLora()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield PEFT's layers in a model, each with the name of its linear layer in transformers' model."""
    for name, module in model.named_modules():
        if is_adapted(module):
            yield name.removeprefix(PEFT_PREFIX), cast(Any, module)


def copied(parameter: Tensor, gather_fn: GatherFn) -> Tensor:
    """Return a parameter's whole value, float32 on the CPU."""
    return gather_fn(parameter).to("cpu", torch.float32, copy=True)
