"""The interface of a method: which banks and samples take part, what is added to the loss, what is stored for later
tasks.

Reading a configuration imports its method's file, so this file imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from mslora_cr.config.methods import load_method
from mslora_cr.config.schema import Section, StreamConfig, Task
from mslora_cr.config.trust import UntrustedMethodError, check_consent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mslora_cr.banks.bank import Bank
    from mslora_cr.banks.kinds import PlainLora
    from mslora_cr.losses.penalty import Distillation, Pair, Penalty
    from mslora_cr.routing.lda import TaskRouter, TaskStatistics
    from mslora_cr.runs.ledger import Ledger
    from mslora_cr.training.passes import Passes

Settings = TypeVar("Settings", bound=Section)


@dataclass(frozen=True)
class Setup:
    """The state from which a task's training starts."""

    config: StreamConfig
    task: Task
    ledger: Ledger
    """Opens the banks of finished tasks."""
    device: torch.device
    """The device of the trainable bank."""

    def state_before(self) -> dict[str, Tensor]:
        """Return the previous task's state, on the CPU; empty for a first task."""
        before = self.config.stream[: self.task.index][-1:]
        return self.ledger.task_state(before[0].name) if before else {}


class Method(Generic[Settings]):
    """A way to learn a stream. Each method is a subclass in a file of its own. Tasks and stages count from 1.

    By default a method trains one bank per task, on the base alone, with cross entropy.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for flag, hook in (("has_penalty", "penalty"), ("has_task_state", "task_state")):
            if hook in vars(cls) and not getattr(cls, flag):
                raise TypeError(f"{cls.__name__} overrides `{hook}`, so it must set `{flag} = True`")

    # --- what the configuration reads ---

    name: ClassVar[str]
    """The method's name, which is also that of its file in the package: lower-case letters, digits and _."""
    section: ClassVar[type[Section] | None] = None
    """The method's hyper-parameters and their defaults, in a section of the method's name; None if it has none."""
    former_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Earlier defaults of hyper-parameters of `section`. A run folder that began with them continues with them, unless
    a configuration sets one of them."""
    banks_by: ClassVar[str] = "prefix"
    """The default of `evaluation.banks_by`: what the method's source answers with."""
    all_at_once: ClassVar[bool] = False
    """Whether its first bank is trained on every task of the stream."""

    def settings(self, config: StreamConfig) -> Settings:
        """Return the method's section of a configuration."""
        return cast(Settings, config.method_section)

    def check(self, config: StreamConfig) -> None:
        """Refuse combinations of values that no single key shows to be wrong; called when a configuration is read.

        Raises:
            ValueError: The message names the key, the error, and how to fix it.
        """

    # --- which banks ---

    keeps_frozen_adapters = False
    """Whether earlier banks are active and frozen while a task trains, and their sum answers."""
    init_from_previous = False
    """Whether a task's bank starts as a copy of the previous one, and the last bank answers alone."""

    def trained(self, config: StreamConfig) -> list[Task]:
        """Return the tasks that get a bank, in order: by default every task."""
        return config.stream

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        """Return the stages that can answer, given the banks of the tasks `learned` in a stream of `tasks` tasks."""
        return learned

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        """Return the banks that answer a task at a stage.

        Where banks are summed, `prefix` takes, as published, those up to the task's own that are learned by that stage;
        `all` takes every bank of the stage.
        """
        if self.init_from_previous:
            return [stage]
        if not self.keeps_frozen_adapters:
            return [task] if task <= stage else []
        return list(range(1, (min(task, stage) if banks_by == "prefix" else stage) + 1))

    # --- what a bank is ---

    def adapter(self, config: StreamConfig) -> PlainLora:
        """Return the kind of adapter that is trained; plain LoRA by default. Each call gives a new one."""
        from mslora_cr.banks.kinds import PlainLora

        return PlainLora()

    def bank_rank(self, rank: int, number: int) -> int:
        """Return the rank of a task's stored bank.

        Args:
            rank: `lora.rank`.
            number: The task's number, from 1.
        """
        return rank

    # --- who answers a question whose task is not given ---

    mixes_banks: ClassVar[bool] = False
    """Whether a question whose task is not given is answered by all banks of the stage, weighed by the router's
    probabilities, instead of by the banks of the likeliest task."""

    def router(self, config: StreamConfig, tasks: Sequence[TaskStatistics], pictures: int) -> TaskRouter:
        """Return the router over the tasks of a stage; streaming linear discriminant analysis by default.

        Args:
            config: The run.
            tasks: The tasks' statistics.
            pictures: The number of image features, which come first.
        """
        from mslora_cr.routing.lda import Router

        return Router(tasks)

    def router_settings(self, config: StreamConfig) -> dict[str, Any]:
        """Return the settings that decide which banks answer; part of the answers' fingerprint."""
        return {}

    def router_examples(self, config: StreamConfig) -> int:
        """Return the number of questions of a task whose features are stored for its router."""
        return 0

    def mixed(self, config: StreamConfig, banks: Sequence[Bank]) -> tuple[list[Bank], list[Bank]]:
        """Return the banks of a stage for mixing: those that always count fully, and one for each task, weighed by the
        task's share."""
        return [], list(banks)

    # --- what a bank starts as ---

    trained_halves: ClassVar[tuple[int, ...]] = (0, 1)
    """The matrices of a bank that are trained, 0 for A and 1 for B; the others keep their initial values."""

    def initial(self, setup: Setup, start: Mapping[str, Pair], passes: Passes) -> dict[str, Pair] | None:
        """Return the bank's initial matrices by linear layer, on the CPU; None keeps the default. Called on every rank.

        Args:
            setup: The task's starting state.
            start: The default initial A and B.
            passes: Passes over the task's samples, for the layers' inputs and for gradients.
        """
        return None

    # --- which samples ---

    def sources(self, config: StreamConfig, task: Task) -> list[Task]:
        """Return the tasks whose training samples are read for a task; their samples are numbered consecutively."""
        return [task]

    def order(self, config: StreamConfig, task: Task, counts: Sequence[int], ledger: Ledger) -> list[int] | None:
        """Return positions among the samples of `sources`, in the order of all visits; None shuffles them every epoch.

        Args:
            config: The run.
            task: The task.
            counts: The number of samples of each of `sources`.
            ledger: Opens the stored state of earlier tasks; empty for those that are not trained yet.
        """
        return None

    # --- what joins the cross entropy ---

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        """Return whether anything is added to the cross entropy of this task."""
        return False

    has_penalty: ClassVar[bool] = False
    """Whether a `penalty` is added to the cross entropy of the tasks that the method `regularizes`."""

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty | None:
        """Return a term of the bank's matrices, computed once per update, if the method `regularizes` the task and
        `has_penalty`.

        Args:
            setup: The task's starting state.
            frozen: The active frozen banks.
        """
        return None

    def distillation(self, setup: Setup) -> Distillation | None:
        """Return a term of every micro-batch's logits, if the method `regularizes` the task."""
        return None

    # --- what is kept ---

    has_task_state: ClassVar[bool] = False
    """Whether the method stores a `task_state` of each task for later ones."""

    def task_state(self, setup: Setup, passes: Passes) -> dict[str, Tensor]:
        """Return the tensors to store beside a trained bank for later tasks, if `has_task_state`. Called on every rank.

        Args:
            setup: The task's starting state.
            passes: Passes over the task's samples through the model with the trained bank.
        """
        return {}


class AnsweringMethod(Protocol):
    """The part of a method that decides which banks answer; reading and exporting a run needs no more."""

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        """As `Method.stages`."""

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        """As `Method.banks`."""


def method_of(config: StreamConfig) -> Method:
    """Return the method that a configuration chooses.

    Raises:
        UntrustedMethodError: Its code may not be imported, or could not be when the configuration was read.
    """
    if not config.knows_method:
        check_consent(config.method)
        raise UntrustedMethodError(f"method {config.method}: it is trusted now, so read its configuration again")
    return cast(Method, load_method(config.method))


def needs_task(config: StreamConfig, method: AnsweringMethod | None = None) -> bool:
    """Return whether tasks are answered by different banks, so that it matters to which task a question belongs.

    Args:
        config: The run.
        method: What is known of its method; by default the method itself.
    """
    method, last = method or method_of(config), len(config.tasks)
    return len({tuple(method.banks(task, last, "prefix")) for task in range(1, last + 1)}) > 1


def sample_schedule(count: int, epochs: float, generator: torch.Generator) -> Tensor:
    """Return positions of ``round(count · epochs)`` visits; each epoch visits all samples in an order of its own."""
    import torch

    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(epochs))]
    return torch.cat(passes)[: round(count * epochs)]
