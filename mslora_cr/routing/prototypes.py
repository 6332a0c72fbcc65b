"""Routing by similarity to each task's prototype: the mean features of its pictures, and those of its questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mslora_cr.routing.lda import TaskStatistics


class PrototypeRouter:
    """``softmax(s / T)`` over tasks, where s is the mean of two cosines with a task's prototypes, or that of the words
    alone.

    Source: Guo et al., "HiDe-LLaVA: Hierarchical Decoupling for Continual Instruction Tuning of Multimodal Large
    Language Model", ACL 2025, on features of CLIP's two towers; here on the frozen base model's (`routing.features`).
    """

    def __init__(
        self, tasks: Sequence[TaskStatistics], pictures: int, temperature: float, words_alone: bool = False
    ) -> None:
        """
        Args:
            tasks: The tasks' statistics, at least one.
            pictures: The number of image features, which come first.
            temperature: T.
            words_alone: Ignore the picture's features.
        """
        self._prototypes, self._pictures = torch.stack([task.mean for task in tasks]), pictures
        self._temperature, self._words_alone = temperature, words_alone

    def route(self, features: Tensor) -> Tensor:
        """Return the index of the most similar task, (questions,) int64, from (questions, features)."""
        return self._similarities(features).argmax(1)

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the share of each task, (questions, tasks) float32, from (questions, features)."""
        return (self._similarities(features) / self._temperature).softmax(1)

    def _similarities(self, features: Tensor) -> Tensor:
        parts = [self._pictures, features.shape[1] - self._pictures]
        cosines = [
            torch.nn.functional.cosine_similarity(part[:, None], prototypes, dim=2)
            for part, prototypes in zip(features.split(parts, 1), self._prototypes.split(parts, 1), strict=True)
        ]
        return torch.stack(cosines[1:] if self._words_alone else cosines).mean(0)
