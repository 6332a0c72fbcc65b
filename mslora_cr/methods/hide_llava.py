"""HiDe-LLaVA: isolated banks, fused into one in the lower layers and weighed by similarity in the last one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer

from mslora_cr.config.schema import PositiveNumber, Section, StreamConfig
from mslora_cr.methods.base import Method

if TYPE_CHECKING:
    from mslora_cr.banks.bank import Bank
    from mslora_cr.routing.lda import TaskRouter, TaskStatistics


class HideLlavaSettings(Section):
    """How HiDe-LLaVA weighs its banks. The defaults are the published values."""

    temperature: PositiveNumber = 0.1
    """T of the softmax over similarities."""
    layers: Literal["last", "all"] = "last"
    """Where banks are weighed: in the last decoder layer, with the others fused, as published; or in all layers, as in
    DISCO."""
    similarity: Literal["both", "question"] = "both"
    """The features that are compared: of picture and question, as published; or of the question alone, as in DISCO."""

    @model_serializer(mode="wrap")
    def _as_before_there_was_a_choice(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("similarity", "both")}


class HideLlava(Method[HideLlavaSettings]):
    """Loss: cross entropy; each bank is trained on the base alone. All banks of the stage answer a question x together.

    ``ΔW = s Σ_t w_t(x) B_t A_t`` in the last decoder layer, ``ΔW = s (Σ_t B_t) (Σ_t A_t)`` in the others, with ``w(x) =
    softmax(½ (cos(v(x), v_t) + cos(q(x), q_t)) / T)``, where v and q are the features of picture and question, and v_t
    and q_t their means over task t.

    Source: Guo et al., "HiDe-LLaVA: Hierarchical Decoupling for Continual Instruction Tuning of Multimodal Large
    Language Model", ACL 2025, as its code computes them, T = 0.1. Guo et al., "Federated Continual Instruction Tuning",
    ICCV 2025 (DISCO), answer, by their code, with `layers: all`, `similarity: question` and T = 0.05, so that ``w(x) =
    softmax(cos(q(x), q_t) / T)`` weighs the banks in every layer. Features here are the frozen model's; the sources use
    CLIP's two towers.
    """

    name = "hide_llava"
    section = HideLlavaSettings
    banks_by = "routed"
    mixes_banks = True

    def router_settings(self, config: StreamConfig) -> dict[str, Any]:
        return self.settings(config).model_dump()

    def router(self, config: StreamConfig, tasks: Sequence[TaskStatistics], pictures: int) -> TaskRouter:
        from mslora_cr.routing.prototypes import PrototypeRouter

        settings = self.settings(config)
        return PrototypeRouter(tasks, pictures, settings.temperature, settings.similarity == "question")

    def mixed(self, config: StreamConfig, banks: Sequence[Bank]) -> tuple[list[Bank], list[Bank]]:
        if self.settings(config).layers == "all":
            return [], list(banks)
        last = max(map(decoder_layer, banks[0].matrices))
        return (
            [only(fused(banks), lambda name: decoder_layer(name) < last)],
            [only(bank, lambda name: decoder_layer(name) == last) for bank in banks],
        )


def decoder_layer(name: str) -> int:
    """Return the number of a linear layer's decoder layer."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    assert match is not None, name
    return int(match[1])


def fused(banks: Sequence[Bank]) -> Bank:
    """Return one bank of the sum of their A matrices and the sum of their B matrices."""
    sums = {}
    for name in banks[0].matrices:
        halves = zip(*(bank.matrices[name] for bank in banks), strict=True)
        a, b = (torch.stack(half).sum(0) for half in halves)
        sums[name] = (a, b)
    return replace(banks[0], name="+".join(bank.name for bank in banks), matrices=sums)


def only(bank: Bank, takes_part: Callable[[str], bool]) -> Bank:
    """Return a bank that adds nothing to layers outside `layers`; zeros there take no memory."""
    pairs = {
        name: (a, b) if takes_part(name) else (a, torch.zeros(()).expand_as(b))
        for name, (a, b) in bank.matrices.items()
    }
    return replace(bank, matrices=pairs)
