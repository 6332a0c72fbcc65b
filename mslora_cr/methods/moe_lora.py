"""A mixture of LoRA experts: one bank, trained on, whose parts a router weighs token by token."""

from typing import Annotated

from pydantic import Field

from mslora_cr.config.schema import Section, StreamConfig
from mslora_cr.methods.base import Method


class MoeLoraSettings(Section):
    """How a mixture of LoRA experts shares a bank's rank."""

    experts: Annotated[int, Field(ge=2)] = 4
    """E; each has rank / E."""


class MoeLora(Method[MoeLoraSettings]):
    """Loss: cross entropy of ``y = W x + alpha/r Σ_e g_e(x) B_e A_e x`` with ``g(x) = softmax(R x)``.

    Each linear layer has E experts of rank r/E and a router R of shape (E, in), all trained on from task to task, so a
    bank has the numbers of a plain one and E · in more. `banks.RoutedExperts` computes it.

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

    def experts(self, config: StreamConfig) -> int:
        return self.settings(config).experts
