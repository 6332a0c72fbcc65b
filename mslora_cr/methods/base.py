"""The interface of a method: which banks and samples take part, what joins the loss, what is stored for later tasks.

Reading a configuration imports its method's file, so this one imports nothing heavy.
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
    """Where the trainable bank is."""

    def state_before(self) -> dict[str, Tensor]:
        """The previous task's state, on the CPU; empty for a first task."""
        before = self.config.stream[: self.task.index][-1:]
        return self.ledger.task_state(before[0].name) if before else {}


class Method(Generic[Settings]):
    """A way to learn a stream; each is a subclass in a file of its own. Tasks and stages count from 1.

    By default a method trains one bank per task, from the base alone, on cross entropy.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for flag, hook in (("has_penalty", "penalty"), ("has_task_state", "task_state")):
            if hook in vars(cls) and not getattr(cls, flag):
                raise TypeError(f"{cls.__name__} overrides `{hook}`, so it must set `{flag} = True`")

    # --- what the configuration reads ---

    name: ClassVar[str]
    """The method's name, which is also that of its file in the package. Lower-case letters, digits and _."""
    section: ClassVar[type[Section] | None] = None
    """The method's hyper-parameters and their defaults, in a section of the method's name; none by default."""
    former_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Hyper-parameters of `section` whose defaults have changed, as they were. A run folder that was begun with them
    goes on with them where a configuration sets none of them."""
    banks_by: ClassVar[str] = "prefix"
    """`evaluation.banks_by` where none is given: what the method's source answers with."""
    all_at_once: ClassVar[bool] = False
    """Its first bank is trained on every task of the stream."""

    def settings(self, config: StreamConfig) -> Settings:
        """The method's section of a configuration."""
        return cast(Settings, config.method_section)

    def check(self, config: StreamConfig) -> None:
        """Refuse what no single key shows to be wrong; called when a configuration is read.

        Raises:
            ValueError: with the key, the error, and how to fix it.
        """

    # --- which banks ---

    keeps_frozen_adapters = False
    """Earlier banks take part, frozen, while a task trains, and their sum answers."""
    init_from_previous = False
    """A task's bank starts as a copy of the one before it, and the last one answers alone."""

    def trained(self, config: StreamConfig) -> list[Task]:
        """The tasks that get a bank, in order: by default every task."""
        return config.stream

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        """The stages of a stream of this many tasks that can answer, given the banks of `learned`."""
        return learned

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        """The banks that answer a task at a stage.

        Where banks are summed, `prefix` takes, as published, those up to the task's own that are learned by that
        stage; `all` takes every bank that the stage has.
        """
        if self.init_from_previous:
            return [stage]
        if not self.keeps_frozen_adapters:
            return [task] if task <= stage else []
        return list(range(1, (min(task, stage) if banks_by == "prefix" else stage) + 1))

    # --- what a bank is ---

    def adapter(self, config: StreamConfig) -> PlainLora:
        """The kind of adapter that is trained; plain LoRA by default. Each call gives a new one."""
        from mslora_cr.banks.kinds import PlainLora

        return PlainLora()

    def bank_rank(self, rank: int, number: int) -> int:
        """The rank of the stored bank of the task of this number, counted from 1.

        Args:
            rank: `lora.rank`.
            number: of the task.
        """
        return rank

    # --- who answers a question whose task is not given ---

    mixes_banks: ClassVar[bool] = False
    """It is answered by all banks of the stage, in shares of the router's probabilities, instead of by the banks of the
    likeliest task."""

    def router(self, config: StreamConfig, tasks: Sequence[TaskStatistics], pictures: int) -> TaskRouter:
        """The router over the tasks of a stage; streaming linear discriminant analysis by default.

        Args:
            pictures: how many of the features, the first ones, are the picture's.
        """
        from mslora_cr.routing.lda import Router

        return Router(tasks)

    def router_settings(self, config: StreamConfig) -> dict[str, Any]:
        """The settings that decide which banks answer, for the answers' fingerprint."""
        return {}

    def router_examples(self, config: StreamConfig) -> int:
        """The number of questions of a task whose features are stored for its router."""
        return 0

    def mixed(self, config: StreamConfig, banks: Sequence[Bank]) -> tuple[list[Bank], list[Bank]]:
        """The banks of a stage as they are mixed: those that take part whole, and one for each task, by its share."""
        return [], list(banks)

    # --- what a bank starts as ---

    trained_halves: ClassVar[tuple[int, ...]] = (0, 1)
    """Which matrices of a bank are trained, 0 for A and 1 for B; the others stay as they start."""

    def initial(self, setup: Setup, start: Mapping[str, Pair], passes: Passes) -> dict[str, Pair] | None:
        """The bank's initial matrices by linear layer, on the CPU; None keeps the default. Called on every rank.

        Args:
            setup: of the task.
            start: A and B as they would start.
            passes: of the task's samples, for what the layers see and for gradients.
        """
        return None

    # --- which samples ---

    def sources(self, config: StreamConfig, task: Task) -> list[Task]:
        """The tasks whose training samples are read while a task trains; their samples are counted through."""
        return [task]

    def order(self, config: StreamConfig, task: Task, counts: Sequence[int], ledger: Ledger) -> list[int] | None:
        """Positions among the samples of `sources`, in the order of all visits; None to shuffle them every epoch.

        Args:
            counts: how many samples each of `sources` has.
            ledger: opens what was kept of tasks before; nothing of those that are not trained yet.
        """
        return None

    # --- what joins the cross entropy ---

    def regularizes(self, config: StreamConfig, task: Task) -> bool:
        """Whether anything joins the cross entropy of this task."""
        return False

    has_penalty: ClassVar[bool] = False
    """A `penalty` joins the cross entropy of the tasks that the method `regularizes`."""

    def penalty(self, setup: Setup, frozen: Sequence[Bank]) -> Penalty | None:
        """A term of the bank's matrices, once per update, where the method `regularizes` the task and `has_penalty`.

        Args:
            frozen: the frozen banks that take part.
        """
        return None

    def distillation(self, setup: Setup) -> Distillation | None:
        """A term of every micro-batch's logits; asked for if the method `regularizes` the task."""
        return None

    # --- what is kept ---

    has_task_state: ClassVar[bool] = False
    """Something is kept of each task for those after it: `task_state`."""

    def task_state(self, setup: Setup, passes: Passes) -> dict[str, Tensor]:
        """What is saved beside a trained bank for later tasks, if `has_task_state`. Called on every rank.

        Args:
            setup: of the task.
            passes: of the task's samples through the model with the trained bank.
        """
        return {}


class AnsweringMethod(Protocol):
    """The part of a method that decides answers; reading and exporting a run need no more."""

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        """As `Method.stages`."""

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        """As `Method.banks`."""


def method_of(config: StreamConfig) -> Method:
    """The method that a configuration chooses.

    Raises:
        UntrustedMethodError: its code may not be imported, or could not be when the configuration was read.
    """
    if not config.knows_method:
        check_consent(config.method)
        raise UntrustedMethodError(f"method {config.method}: read its configuration again, now that it is trusted")
    return cast(Method, load_method(config.method))


def needs_task(config: StreamConfig, method: AnsweringMethod | None = None) -> bool:
    """Whether it matters which task a question belongs to: whether tasks are answered by different banks.

    Args:
        config: the run.
        method: what is known of its method; None: the method itself.
    """
    method, last = method or method_of(config), len(config.tasks)
    return len({tuple(method.banks(task, last, "prefix")) for task in range(1, last + 1)}) > 1


def sample_schedule(count: int, epochs: float, generator: torch.Generator) -> Tensor:
    """Positions of ``round(count · epochs)`` visits: each epoch goes through all samples in an order of its own."""
    import torch

    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(epochs))]
    return torch.cat(passes)[: round(count * epochs)]
