"""What a task minimises beside the cross entropy: a penalty once per update, a distillation in every micro-batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mslora_cr.banks.stack import BankStack
from mslora_cr.data.datasets import ConcatTrainDataset
from mslora_cr.distributed.deepspeed import gather_params
from mslora_cr.losses.penalty import Distillation, Key, Penalty, penalty_hook
from mslora_cr.utils.errors import UserError


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite; the message names the records of the batch."""


def check_finite(loss: Tensor, where: str, samples: ConcatTrainDataset, records: Tensor) -> None:
    """Refuse a loss that is no number, before anything is updated.

    Args:
        loss: The loss of a batch.
        where: The run and step, for the message.
        samples: The task's samples.
        records: Those of the batch, (batch,).

    Raises:
        NonFiniteLossError: The loss is NaN or infinite.
    """
    if not torch.isfinite(loss):
        locations = "\n  ".join(samples.location(index) for index in records.tolist() if index < len(samples))
        raise NonFiniteLossError(
            f"{where} is {loss.item()}; nothing was updated. The batch:\n"
            f"  {locations}\nA lower learning rate or training.bf16 instead of fp16 usually helps."
        )


class Objective:
    """The terms that a method adds to the cross entropy.

    A tensor hook adds the penalty's gradient to each matrix's own, in the last backward pass before an update. The hook
    sees whole matrices under DDP and every ZeRO stage; an update gets the gradient once, whatever the accumulation; and
    averaging over ranks leaves it unchanged.
    """

    def __init__(self, penalty: Penalty | None = None, distillation: Distillation | None = None) -> None:
        """
        Args:
            penalty: A term of the bank's matrices.
            distillation: A term of the logits with and without the bank.
        """
        self.penalty, self.distillation = penalty, distillation
        self._trainable: Mapping[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._pending: dict[Key, Tensor] = {}

    def attach(self, stack: BankStack) -> None:
        """Hook the trainable bank's trained matrices, so that the penalty's gradient is added to theirs."""
        self._trainable = stack.trainable()
        matrices = {(name, half): matrix for name, pair in self._trainable.items() for half, matrix in enumerate(pair)}
        for key, matrix in matrices.items():
            if self.penalty is not None and matrix.requires_grad:
                matrix.register_hook(penalty_hook(self._pending, key))

    @contextmanager
    def penalized(self, learning_rate: float, where: str) -> Iterator[tuple[Tensor | None, Mapping[str, Tensor]]]:
        """Add the penalty's gradient at the current matrices in backward passes inside the block.

        Args:
            where: The run and step, for the message.

        Yields:
            The penalty's value, None without one, and its terms for the log.

        Raises:
            NonFiniteLossError: The penalty is NaN or infinite.
        """
        if self.penalty is None:
            yield None, {}
            return
        with gather_params(itertools.chain.from_iterable(self._trainable.values())), torch.no_grad():
            step = self.penalty.step(self._trainable, learning_rate)
        if not torch.isfinite(step.value):
            raise NonFiniteLossError(
                f"{where} is {step.value.item()}; nothing was updated. Lower its weights or the learning rate."
            )
        self._pending.update(step.gradients)
        try:
            yield step.value, step.logged
        finally:
            self._pending.clear()

    @property
    def frozen_bytes(self) -> int:
        """The memory that the penalty takes for earlier banks."""
        return self.penalty.frozen_bytes if self.penalty else 0

    @property
    def weights(self) -> dict[str, float] | None:
        """The penalty's current weights; None without a penalty."""
        return self.penalty.weights if self.penalty else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint inside the task."""
        return self.penalty.state_dict() if self.penalty else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's `state_dict`."""
        if self.penalty:
            self.penalty.load_state_dict(state)
