"""Banks that are mixtures of LoRA experts, in a PEFT model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mslora_cr.banks.bank import BankError
from mslora_cr.banks.io import PEFT_PREFIX
from mslora_cr.models.language import is_adapted


class RoutedExperts(nn.Linear):
    """PEFT's A of a mixture of experts: ``g(x) ⊙ A x``, so that B of it is the weighted sum of the experts.

    The router is a module of its own, so that ZeRO-3 gathers it when it is called.
    """

    def __init__(self, plain: nn.Linear, experts: int) -> None:
        weight = plain.weight
        super().__init__(plain.in_features, plain.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.weight = weight
        self.router = nn.Linear(plain.in_features, experts, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, in) to (…, rank)."""
        shares = self.router(input).softmax(-1)
        return super().forward(input) * shares.repeat_interleave(self.out_features // self.router.out_features, -1)


def route(model: nn.Module, adapter: str, experts: int) -> None:
    """Turn an adapter into a mixture of experts. Routers start uniformly at random, as PyTorch initialises a linear
    layer."""
    for module in model.modules():
        if is_adapted(module):
            module.lora_A[adapter] = RoutedExperts(module.lora_A[adapter], experts)


def routers_of(model: nn.Module, adapter: str) -> dict[str, nn.Linear]:
    return {
        name.removeprefix(PEFT_PREFIX): module.lora_A[adapter].router
        for name, module in model.named_modules()
        if is_adapted(module) and isinstance(module.lora_A[adapter], RoutedExperts)
    }


@torch.no_grad()
def copy_routers(model: nn.Module, adapter: str, routers: Mapping[str, Tensor]) -> None:
    adapter_routers = routers_of(model, adapter)
    if {name: router.weight.shape for name, router in adapter_routers.items()} != {
        name: r.shape for name, r in routers.items()
    }:
        raise BankError("a mixture can only continue a mixture with as many experts, and plain LoRA only plain LoRA")
    for name, router in adapter_routers.items():
        router.weight.copy_(routers[name])
