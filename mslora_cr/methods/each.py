"""One bank per task, each from the base alone: no task can disturb another, and none helps another."""

from mslora_cr.methods.base import Method


class Each(Method):
    """Loss: cross entropy. Task t is answered by the base with bank t.

    Source: the data-specific LoRA that Zhang et al., "Contrastive Regularization over LoRA for Multimodal Biomedical
    Image Incremental Learning", ACM MM 2025, compare with.
    """

    name = "each"
