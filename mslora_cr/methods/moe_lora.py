"""A mixture of LoRA experts: one bank, trained on, whose parts a router weighs token by token."""

from mslora_cr.config.schema import StreamConfig
from mslora_cr.methods.base import Method


class MoeLora(Method):
    """Loss: cross entropy of ``y = W x + alpha/r Σ_e g_e(x) B_e A_e x`` with ``g(x) = softmax(R x)``.

    Each linear layer has E experts of rank r/E and a router R of shape (E, in), all trained on from task to task, so a
    bank has the numbers of a plain one and E · in more. `banks.RoutedExperts` computes it.

    Source: MoELoRA in Chen et al., "CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large Language
    Models", NeurIPS 2024.
    """

    init_from_previous = True

    def experts(self, config: StreamConfig) -> int:
        assert config.moe_lora is not None
        return config.moe_lora.experts
