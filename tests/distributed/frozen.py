"""Whether what is frozen has moved; `look_and_fail` is called in every rank before the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import Task
from mslora_cr.distributed.comm import barrier, rank
from mslora_cr.distributed.deepspeed import gather_params
from mslora_cr.models.load import load_base
from mslora_cr.stream import train as stream
from mslora_cr.stream.plan import frozen_tasks
from mslora_cr.training.trainer import BankTrainer


def look_and_fail(folder: Path, at_step: int) -> None:
    """At the start of a step, the launch's `at_step`-th, write `folder/RANK.json` and end with an error.

    The file says how many frozen tensors were compared with those that the files on disk give, bit by bit, and which
    differ.
    """
    train_task, training_step = stream.train_task, BankTrainer.training_step
    expected: dict[str, Tensor] = {}
    steps = 0

    def train_task_and_remember(run: stream.StreamRun, task: Task) -> None:
        config = run.config
        # Before DeepSpeed hears of the task: it would shard this model too.
        banks = run.ledger.banks(config, frozen_tasks(config, task))
        fresh = BankStack(load_base(config, "cpu").model, config.lora.fold)
        fresh.set_frozen(banks)
        fresh.add_trainable(config.lora.rank, config.lora.alpha)
        expected.clear()
        expected.update({name: tensor for name, tensor in fresh.model.named_parameters() if not tensor.requires_grad})
        for place, bank in enumerate(banks):
            for module, pair in bank.matrices.items():
                numbers = {f"penalty.{place}.{module}.{half}": matrix.flatten() for half, matrix in enumerate(pair)}
                expected.update(numbers)
        train_task(run, task)

    def step_or_look(self: BankTrainer, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps < at_step:
            return training_step(self, *args, **kwargs)
        held = frozen_tensors(self)
        assert held.keys() == expected.keys()
        changed = [name for name, tensor in held.items() if not torch.equal(tensor, expected[name])]
        (folder / f"{rank()}.json").write_text(json.dumps({"compared": len(held), "changed": changed}))
        self._publisher.wait()  # the checkpoint that is to be looked at has its name
        barrier()
        raise ZeroDivisionError("planted")

    stream.train_task = train_task_and_remember  # type: ignore[assignment]
    BankTrainer.training_step = step_or_look  # type: ignore[method-assign]


def frozen_tensors(trainer: BankTrainer) -> dict[str, Tensor]:
    """Everything frozen that a rank holds: base, merged banks, and the penalty's copies of them."""
    found = {}
    for name, parameter in trainer.stack.model.named_parameters():
        if not parameter.requires_grad:
            with gather_params([parameter]):
                found[name] = parameter.detach().clone()
    for group in trainer.objective.penalty._terms._groups:  # type: ignore[union-attr]
        for (module, half), banks in zip(group.keys, group.frozen, strict=True):
            found.update({f"penalty.{place}.{module}.{half}": bank for place, bank in enumerate(banks)})
    return found
