"""A mixture of LoRA experts: one bank for the whole stream, whose parts a router weighs token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from mslora_cr.config.schema import Section, StreamConfig
from mslora_cr.methods.base import Method, Setup

if TYPE_CHECKING:
    from mslora_cr.banks.kinds import Experts
    from mslora_cr.losses.penalty import Pair
    from mslora_cr.training.passes import Passes

SOURCE_DEVIATION = 0.01
"""The standard deviation of A's entries in the source."""


class MoeLoraSettings(Section):
    """How a mixture of LoRA experts divides a bank's rank."""

    experts: Annotated[int, Field(ge=2)] = 4
    """E, the number of experts; each has rank / E. The source's scripts use 8."""
    initialization: Literal["peft", "source"] = "peft"
    """The initial A: Kaiming-uniform, as in a plain bank, or normal with standard deviation 0.01, as in the source."""

    @model_serializer(mode="wrap")
    def _as_before_there_was_a_choice(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("initialization", "peft")}


class MoeLora(Method[MoeLoraSettings]):
    """Loss: cross entropy of ``y = W x + alpha/r Σ_e g_e(x) B_e A_e x`` with ``g(x) = softmax(R x)``.

    Each linear layer has E experts of rank r/E and a router R of shape (E, in), which all continue to train from task
    to task. So a bank has the parameters of a plain one and E · in more. `mslora_cr.banks.experts.RoutedExperts`
    computes it.

    Source: MoELoRA in Chen et al., "CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large Language
    Models", NeurIPS 2024.
    """

    name = "moe_lora"
    section = MoeLoraSettings
    init_from_previous = True

    def check(self, config: StreamConfig) -> None:
        experts = self.settings(config).experts
        if config.lora.rank % experts:
            raise ValueError(f"moe_lora.experts: {experts} does not divide lora.rank {config.lora.rank}")

    def initial(self, setup: Setup, start: Mapping[str, Pair], passes: Passes) -> dict[str, Pair] | None:
        if setup.task.index or self.settings(setup.config).initialization == "peft":
            return None
        generator = torch.Generator().manual_seed(setup.config.seed)
        return {
            name: (torch.randn(a.shape, generator=generator) * SOURCE_DEVIATION, torch.zeros(b.shape))
            for name, (a, b) in start.items()
        }

    def adapter(self, config: StreamConfig) -> Experts:
        from mslora_cr.banks.kinds import Experts

        return Experts(self.settings(config).experts)
