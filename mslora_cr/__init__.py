"""Modality-specific LoRA banks with contrastive regularization for incremental biomedical imaging tasks."""

__version__ = "0.1.0"
