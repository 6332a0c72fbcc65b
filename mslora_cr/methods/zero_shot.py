"""The base model without any bank: the starting point of every method."""

from collections.abc import Sequence

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.methods.base import Method


class ZeroShot(Method):
    """Nothing is trained; the base answers every task, so every stage is the same model.

    Its scores are the b_i of forward transfer: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual
    Learning", NeurIPS 2017.
    """

    name = "zero_shot"

    def trained(self, config: StreamConfig) -> list[Task]:
        return []

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        return range(1, tasks + 1)

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        return []
