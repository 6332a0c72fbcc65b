"""A trained router: softmax regression on the features of a few stored questions of each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mslora_cr.banks.bank import BankError
from mslora_cr.routing.lda import TaskStatistics

STEPS = 500
"""The most iterations of L-BFGS; it converges long before."""


class LearnedRouter:
    """``p = softmax(W x + c)``, where W and c minimize ``-mean log p(own task) + λ/2 ‖W‖²`` over the stored questions.

    The loss is strictly convex in W, so the result does not depend on the starting point.
    """

    def __init__(self, tasks: Sequence[TaskStatistics], decay: float) -> None:
        """
        Args:
                tasks: The tasks' statistics, at least one, with examples.
                decay: λ.

        Raises:
                BankError: A task has no examples: its statistics belong to another method.
        """
        task_examples = [task.examples for task in tasks if task.examples is not None]
        if len(task_examples) < len(tasks):
            raise BankError(
                "router statistics without the questions that a learned router is trained on; `mslora-cr bank "
                "fit-router CONFIG` makes them from the tasks' training records"
            )
        examples = torch.cat(task_examples).double()
        labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(task_examples)])
        self._weights = torch.zeros(len(tasks), examples.shape[1], dtype=torch.float64, requires_grad=True)
        self._biases = torch.zeros(len(tasks), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weights, self._biases],
            max_iter=STEPS,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(examples @ self._weights.T + self._biases, labels)
            value = value + decay / 2 * self._weights.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)

    def route(self, features: Tensor) -> Tensor:
        """Return the index of the likeliest task, (questions,) int64, from (questions, features)."""
        return self.probabilities(features).argmax(1)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each task, (questions, tasks) float64, from (questions, features)."""
        return (features.double() @ self._weights.T + self._biases).softmax(1)
