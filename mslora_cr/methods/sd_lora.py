"""SD-LoRA: earlier updates keep their directions, while every task sets their magnitudes anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mslora_cr.config.schema import StreamConfig
from mslora_cr.methods.base import Method

if TYPE_CHECKING:
    from mslora_cr.banks.kinds import ScaledDirections


class SdLora(Method):
    """Loss: cross entropy of ``W + Σ_{i<t} m_i D_i + s B_t A_t`` with ``D_i = s B_i A_i / ‖s B_i A_i‖_F``.

    The magnitudes m_i of all earlier tasks, layer by layer, and bank t are trained. The m_i start at their values after
    the previous task, and the newest one at the norm of its update, so a task starts from the model that the previous
    task left. Bank t is stored together with all of them, as one plain bank of rank t · r: it answers alone.

    Source: Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", ICLR 2025.
    """

    name = "sd_lora"
    init_from_previous = True

    def adapter(self, config: StreamConfig) -> ScaledDirections:
        from mslora_cr.banks.kinds import ScaledDirections

        return ScaledDirections(config.lora.rank)

    def bank_rank(self, rank: int, number: int) -> int:
        return rank * number
