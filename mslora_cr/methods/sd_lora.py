"""SD-LoRA: earlier updates keep their directions, while every task sets their magnitudes anew."""

from mslora_cr.methods.base import Method


class SdLora(Method):
    """Loss: cross entropy of ``W + Σ_{i<t} m_i D_i + s B_t A_t`` with ``D_i = s B_i A_i / ‖s B_i A_i‖_F``.

    Trained are the magnitudes m_i of all earlier tasks, layer by layer, and bank t. The m_i start as they are after
    the task before, the newest as the norm of its update, so a task starts from the model that the one before it left.
    Bank t is stored with all of them, as one plain bank of rank t · r: it answers alone.

    Source: Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", ICLR 2025.
    """

    name = "sd_lora"
    init_from_previous = True
    accumulates = True
