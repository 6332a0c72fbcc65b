"""Selects the banks of a run that answer a task at a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.methods.base import AnsweringMethod, method_of, needs_task
from mslora_cr.stream.recorded import answering_method


@dataclass(frozen=True)
class RunBanks:
    """A run's finished banks by task, and which of them its method answers with. Stages count from 1; 0 is the base
    model."""

    config: StreamConfig
    banks: Mapping[str, Bank]

    @cached_property
    def method(self) -> AnsweringMethod:
        """The run's method, or the ledger's record of one whose code may not be imported."""
        return answering_method(self.config)

    @property
    def learned(self) -> list[int]:
        """The numbers, from 1, of the tasks whose banks exist."""
        return [task.index + 1 for task in self.config.stream if task.name in self.banks]

    @property
    def stages(self) -> list[int]:
        """The stages that can answer, 0 first."""
        return [0, *self.method.stages(self.learned, len(self.config.tasks))]

    @property
    def needs_task(self) -> bool:
        """Whether different banks answer different tasks."""
        return needs_task(self.config, self.method)

    def stage(self, stage: int | None) -> int:
        """Return the given stage, or the last one if none is given.

        Raises:
            BankError: This run's banks do not reach it.
        """
        if stage is None:
            return self.stages[-1]
        if stage not in self.stages:
            there = ", ".join(map(str, self.stages))
            raise BankError(f"the banks in {self.config.run_dir} do not reach stage {stage}; there are {there}")
        return stage

    def answering(self, task: str | None, stage: int) -> list[Bank]:
        """Return the banks with which `evaluate` would answer a task at a stage.

        Args:
            task: Optional at stage 0, and if the same banks answer all tasks.

        Raises:
            ConfigError: There is no such task, or one must be named.
            BankError: A bank is missing.
        """
        if stage == 0:
            return []
        if task is None and self.needs_task:
            names = ", ".join(task.name for task in self.config.stream)
            raise ConfigError(f"method {self.config.method} answers each task with banks of its own; name one: {names}")
        number = self.config.task(task).index + 1 if task is not None else 1
        by = "prefix" if self.config.evaluation.banks_by == "routed" else self.config.evaluation.banks_by
        wanted = [self.config.stream[position - 1] for position in self.method.banks(number, stage, by)]
        return [self.bank(member) for member in wanted]

    def mixed(self, stage: int, likely: Mapping[str, float]) -> list[Bank]:
        """Return the banks of a stage for a question with these task probabilities, each scaled by its share.

        Raises:
            BankError: A bank is missing.
        """
        tasks = self.routed(stage)
        whole, shared = method_of(self.config).mixed(self.config, [self.bank(task) for task in tasks])
        shares = [likely[task.name] for task in tasks]
        return [*whole, *(replace(bank, alpha=bank.alpha * part) for bank, part in zip(shared, shares, strict=True))]

    def bank(self, task: Task) -> Bank:
        if task.name not in self.banks:
            raise BankError(f"task {task.name!r} is not trained yet in {self.config.run_dir}; train it first")
        return self.banks[task.name]

    def routed(self, stage: int) -> list[Task]:
        """Return the tasks among which a router chooses after a stage.

        Raises:
            BankError: One of them is not trained.
        """
        chosen = self.config.stream[:stage]
        for task in chosen:
            self.bank(task)
        return chosen
