"""One bank on all tasks at once: the upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.methods.base import Method, sample_schedule

if TYPE_CHECKING:
    from mslora_cr.runs.ledger import Ledger


class Joint(Method):
    """Loss: cross entropy on the shuffled union of all tasks' samples; each is visited as often as in the stream.

    The bank is stored under the first task's name and trains with that task's batch size and learning rate. It answers
    every task, so every stage is the same model.

    Source: multi-task training; Caruana, "Multitask Learning", Machine Learning 28, 1997.
    """

    name = "joint"
    all_at_once = True

    def trained(self, config: StreamConfig) -> list[Task]:
        return config.stream[:1]

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        return range(1, tasks + 1) if learned else []

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        return [1]

    def sources(self, config: StreamConfig, task: Task) -> list[Task]:
        return config.stream

    def order(self, config: StreamConfig, task: Task, counts: Sequence[int], ledger: Ledger) -> list[int]:
        generator = torch.Generator().manual_seed(config.seed)
        positions, start = [], 0
        for source, count in zip(config.stream, counts, strict=True):
            positions.append(start + sample_schedule(count, source.epochs, generator))
            start += count
        union = torch.cat(positions)
        return union[torch.randperm(len(union), generator=generator)].tolist()
