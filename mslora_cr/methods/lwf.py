"""Learning without Forgetting: the new bank must preserve the answers of the previous model."""

from functools import partial

from torch import Tensor

from mslora_cr.config.schema import PositiveNumber, Section, StreamConfig, Task
from mslora_cr.losses.penalty import Distillation
from mslora_cr.methods.base import Method, Setup


class LwfSettings(Section):
    """Settings of the distillation. The defaults are the published values."""

    strength: PositiveNumber = 1.0
    """λ_o, the weight of the term."""
    temperature: PositiveNumber = 2.0


class Lwf(Method[LwfSettings]):
    """``CE + λ · mean over answer tokens of -Σ_v p_v log q_v``, p = softmax(teacher / T), q = softmax(student / T).

    The teacher is the same model with the new bank off, on the new task's own samples: no old sample is stored. The
    first task has no teacher. All banks are summed for every question.

    Source: Li and Hoiem, "Learning without Forgetting", TPAMI 2018: T = 2, λ_o = 1.
    """

    name = "lwf"
    section = LwfSettings
    banks_by = "all"
    keeps_frozen_adapters = True

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        return task.index > 0

    def distillation(self, setup: Setup) -> Distillation:
        settings = self.settings(setup.config)
        return Distillation(settings.strength, partial(softened_cross_entropy, temperature=settings.temperature))


def softened_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``-Σ_v p_v log q_v`` of logits (positions, vocabulary), softened by T; (positions,) float32."""
    p = (teacher.float() / temperature).softmax(-1)
    return -(p * (student.float() / temperature).log_softmax(-1)).sum(-1)
