"""Experience replay: one bank for the whole stream, with samples of earlier tasks in every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from mslora_cr.config.schema import PositiveInt, PositiveNumber, Section, StreamConfig, Task
from mslora_cr.methods.base import Method, Setup, sample_schedule

if TYPE_CHECKING:
    from mslora_cr.runs.ledger import Ledger
    from mslora_cr.training.passes import Passes


class ReplaySettings(Section):
    """How many earlier samples are kept, and their share of each batch."""

    buffer_size: PositiveInt = 1000
    """The number of samples kept, over all earlier tasks together."""
    share: Annotated[PositiveNumber, Field(lt=1)] = 0.5
    """The share of old samples in each batch, from the second task on."""


class Replay(Method[ReplaySettings]):
    """Loss: cross entropy of batches of which a share, half as published, comes from a buffer of earlier samples.

    The buffer holds at most `replay.buffer_size` samples, equally many of each task. A task's samples are chosen at
    random, by the run's seed alone; when a later task needs room, the last chosen are dropped. The buffer is stored as
    positions in `train.json`.

    Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019.
    """

    name = "replay"
    section = ReplaySettings
    init_from_previous = True
    has_task_state = True

    def check(self, config: StreamConfig) -> None:
        for task in config.tasks:
            if task.batch_size == 1:
                raise ValueError(
                    f"tasks.{task.name}.batch_size: replay mixes new and old samples in a batch; use at least 2"
                )

    def sources(self, config: StreamConfig, task: Task) -> list[Task]:
        return [task, *config.stream[: task.index]]

    def order(self, config: StreamConfig, task: Task, counts: Sequence[int], ledger: Ledger) -> list[int] | None:
        settings = self.settings(config)
        earlier = config.stream[: task.index]
        if not earlier:
            return None
        buffer = ledger.task_state(earlier[-1].name) or self.choose(config, earlier, counts[1:])
        starts = torch.tensor(counts).cumsum(0).tolist()
        old = torch.cat([buffer[source.name] + start for source, start in zip(earlier, starts, strict=False)])
        return mix(old, counts[0], task, settings.share, config.seed)

    def task_state(self, setup: Setup, passes: Passes) -> dict[str, Tensor]:
        """Return the buffer for the next task: by task, positions in its records, int64."""
        of_task, *earlier = passes.sample_counts
        return self.choose(setup.config, setup.config.stream[: setup.task.index + 1], [*earlier, of_task])

    def choose(self, config: StreamConfig, tasks: Sequence[Task], counts: Sequence[int]) -> dict[str, Tensor]:
        """Return a balanced buffer of these tasks' samples; the first tasks get the remainder."""
        share, rest = divmod(self.settings(config).buffer_size, len(tasks))
        chosen = {}
        for task, count in zip(tasks, counts, strict=True):
            everything = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed + task.index))
            chosen[task.name] = everything[: share + (task.index < rest)].clone()
        return chosen


def mix(old: Tensor, new: int, task: Task, share: float, seed: int) -> list[int]:
    """Return all visits of a task: its epochs over positions 0..new-1, with `share` of each batch drawn from `old`.

    Draws go through the whole buffer, each time in a new order, before any sample is drawn again.
    """
    generator = torch.Generator().manual_seed(seed + task.index)
    replayed = min(max(round(share * task.batch_size), 1), task.batch_size - 1)
    batches = sample_schedule(new, task.epochs, generator).split(task.batch_size - replayed)
    drawn = sample_schedule(len(old), len(batches) * replayed / len(old) + 1, generator)
    order: list[int] = []
    for number, batch in enumerate(batches):
        mixed = torch.cat([batch, old[drawn[number * replayed : (number + 1) * replayed]]])
        order += mixed[torch.randperm(len(mixed), generator=generator)].tolist()
    return order
