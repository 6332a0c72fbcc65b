"""MR-LoRA: isolated banks, and a router that is itself trained on a few questions of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mslora_cr.config.schema import PositiveInt, PositiveNumber, Section, StreamConfig
from mslora_cr.methods.base import Method

if TYPE_CHECKING:
    from mslora_cr.routing.lda import TaskRouter, TaskStatistics


class MrLoraSettings(Section):
    """Settings of MR-LoRA's router."""

    examples: PositiveInt = 20
    """The number of questions of each task whose features are stored."""
    decay: PositiveNumber = 1e-3
    """λ, the weight decay of the router."""


class MrLora(Method[MrLoraSettings]):
    """Loss: cross entropy; each bank is trained on the base alone. The bank of task ``argmax_t p(t)`` answers a
    question.

    After each task the router is trained anew on `examples` questions of every task so far: ``min -mean log p(own task)
    + λ/2 ‖W‖²`` with ``p = softmax(W x + c)`` of a question's features x.

    Source: Zhao et al., "MLLM-CL: Continual Learning for Multimodal Large Language Models", 2025: isolated banks, and a
    router trained by cross entropy on a few stored samples of each task, which names one bank. In the source the router
    is the model itself, with a LoRA of its own, asked for the bank's letter. Here it is a softmax layer on the frozen
    model's features of picture and question, which needs no pass of the language model.
    """

    name = "mr_lora"
    section = MrLoraSettings
    banks_by = "routed"

    def router_examples(self, config: StreamConfig) -> int:
        return self.settings(config).examples

    def router_settings(self, config: StreamConfig) -> dict[str, Any]:
        return {"decay": self.settings(config).decay}

    def router(self, config: StreamConfig, tasks: Sequence[TaskStatistics], pictures: int) -> TaskRouter:
        from mslora_cr.routing.learned import LearnedRouter

        return LearnedRouter(tasks, self.settings(config).decay)
