"""One bank per task, each on the base alone: tasks neither disturb nor help each other."""

from mslora_cr.methods.base import Method


class Each(Method):
    """Loss: cross entropy. The base with bank t answers task t.

    Source: the data-specific LoRA with which Zhang et al., "Contrastive Regularization over LoRA for Multimodal
    Biomedical Image Incremental Learning", ACM MM 2025, compare.
    """

    name = "each"
