"""Linear discriminant analysis, learned task by task: a router over any number of tasks from each task's statistics.

Source: streaming linear discriminant analysis, Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear
Discriminant Analysis", CVPR workshops 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mslora_cr.banks.bank import BankError
from mslora_cr.banks.io import STATISTICS
from mslora_cr.utils.regular import check_regular

SHRINKAGE = 0.1
"""How far covariances between features are shrunk towards zero; their variances stay."""
DISTANCES = "distances of "
"""Prefix of the name under which held-out distances by a part of the features are stored."""
RIDGE = 1e-3
"""Added to each variance, as a share of their mean, for features that vary in no task."""


@dataclass(frozen=True)
class TaskStatistics:
    """A task's statistics for the router.

    Attributes:
        count: The number of records.
        mean: (features,) float32.
        scatter: (features, features) float32, ``Σ (x - mean)(x - mean)ᵀ``.
        examples: (examples, features) of some records, for a router that learns from them; None for other routers.
        distances: (records,) float32, ascending: how far records lie from statistics that have not seen them
            (`foreign.held_out_distances`); None in files of earlier versions.
        part_distances: The same by picture alone and by text alone; empty in files of earlier versions.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    examples: Tensor | None = None
    distances: Tensor | None = None
    part_distances: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a safetensors file."""
        state = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        parts = {f"{DISTANCES}{part}": values for part, values in self.part_distances.items()}
        more = {"examples": self.examples, "distances": self.distances, **parts}
        return state | {name: tensor for name, tensor in more.items() if tensor is not None}


class TaskRouter(Protocol):
    """Predicts the task of a question from its features."""

    def route(self, features: Tensor) -> Tensor:
        """Return the index of the likeliest task, (questions,) int64, from (questions, features)."""

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each task, (questions, tasks), from (questions, features)."""


def statistics_of(gram: Tensor) -> TaskStatistics:
    """Return the statistics from ``Σ [x, 1]ᵀ [x, 1]`` over a task's records, (features + 1, features + 1) float64."""
    count, total = gram[-1, -1], gram[-1, :-1]
    mean = total / count
    return TaskStatistics(int(count), mean.float(), (gram[:-1, :-1] - torch.outer(total, mean)).float())


def combine(parts: Sequence[TaskStatistics]) -> TaskStatistics:
    """Combine the statistics of several sites into those of all records; no record leaves its site.

    The scatter about the common mean is ``Σ_i S_i + n_i (m_i - m)(m_i - m)ᵀ``. Source: Chan, Golub and LeVeque,
    "Algorithms for Computing the Sample Variance", The American Statistician 1983.

    Args:
        parts: At least one, with equally many features.

    Raises:
        ValueError: They have different numbers of features.
    """
    if len({len(part.mean) for part in parts}) > 1:
        widths = ", ".join(str(len(part.mean)) for part in parts)
        raise ValueError(f"statistics with different numbers of features ({widths}) cannot be combined")
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean for part in parts]).double()
    mean = counts @ means / counts.sum()
    between = (means - mean).T @ (counts[:, None] * (means - mean))
    scatter = torch.stack([part.scatter for part in parts]).double().sum(0) + between
    examples = [part.examples for part in parts if part.examples is not None]
    # Each site measured its records by its own statistics: theirs by the common ones are about as large.
    distances = [part.distances for part in parts if part.distances is not None]
    named = set.intersection(*(set(part.part_distances) for part in parts))
    return TaskStatistics(
        int(counts.sum()),
        mean.float(),
        scatter.float(),
        torch.cat(examples) if len(examples) == len(parts) else None,
        torch.cat(distances).sort().values if len(distances) == len(parts) else None,
        {name: torch.cat([part.part_distances[name] for part in parts]).sort().values for name in sorted(named)},
    )


def load_statistics(bank_folder: Path) -> TaskStatistics:
    """Read the statistics saved with a bank.

    Raises:
        BankError: There is nothing readable.
    """
    path = bank_folder / STATISTICS
    try:
        stored = load_file(check_regular(path))
        parts = {name.removeprefix(DISTANCES): of for name, of in stored.items() if name.startswith(DISTANCES)}
        more = (stored.get("examples"), stored.get("distances"), parts)
        return TaskStatistics(int(stored["count"]), stored["mean"], stored["scatter"], *more)
    except (OSError, KeyError, SafetensorError) as error:
        raise BankError(
            f"{path}: no usable router statistics ({error!r}); `mslora-cr bank fit-router CONFIG` computes it from "
            "the task's training records"
        ) from None


class Router:
    """Linear discriminants over tasks, all of them equally likely a priori."""

    def __init__(self, tasks: Sequence[TaskStatistics]) -> None:
        """
        Args:
            tasks: The tasks' statistics, at least one, with equally many features.
        """
        freedom = max(1, sum(task.count for task in tasks) - len(tasks))
        pooled = torch.stack([task.scatter for task in tasks]).double().sum(0) / freedom
        covariance = shrunken(pooled)
        means = torch.stack([task.mean for task in tasks]).double()
        self._weights = torch.cholesky_solve(means.T, cholesky(covariance))
        self._biases = -0.5 * (means.T * self._weights).sum(0)

    def route(self, features: Tensor) -> Tensor:
        """Return the index of the likeliest task, (questions,) int64, from (questions, features)."""
        return self._discriminants(features).argmax(1)

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each task, (questions, tasks) float64, from (questions, features).

        Under the model's assumption, normal features with one covariance, the posterior is the discriminants' softmax:
        Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 2nd edition, section 4.3.
        """
        return self._discriminants(features).softmax(1)

    def _discriminants(self, features: Tensor) -> Tensor:
        return features.double() @ self._weights + self._biases


def shrunken(covariance: Tensor) -> Tensor:
    """Return a covariance, (features, features) float64, drawn to its diagonal, with something on it for each
    feature."""
    variances = covariance.diagonal()
    return (1 - SHRINKAGE) * covariance + torch.diag(SHRINKAGE * variances + RIDGE * variances.mean() + 1e-12)


def cholesky(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor of a covariance, with enough added to its diagonal: if features hardly vary, the
    float32 rounding of their scatter can leave a negative eigenvalue."""
    added = torch.finfo(torch.float32).eps
    factor, failed = torch.linalg.cholesky_ex(covariance)
    while failed:
        factor, failed = torch.linalg.cholesky_ex(covariance + added * torch.eye(len(covariance), dtype=torch.double))
        added *= 10
    return factor
