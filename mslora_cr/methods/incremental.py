"""Frozen banks and a new one: MSLoRA-CR without its two penalties."""

from mslora_cr.methods.base import Method


class Incremental(Method):
    """Loss: cross entropy of the base with banks 1..t; only bank t is trained.

    Source: the incremental LoRA on which Zhang et al., "Contrastive Regularization over LoRA for Multimodal Biomedical
    Image Incremental Learning", ACM MM 2025, build.
    """

    name = "incremental"
    keeps_frozen_adapters = True
