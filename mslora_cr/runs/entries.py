"""`ledger.json`, typed. Separate from `ledger`, so that reading it does not import PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from mslora_cr.utils.state import Part, StateFile


class Imported(Part):
    """The file that an imported bank was read from."""

    path: str
    sha256: str


class TaskEntry(Part):
    """A finished task. How an imported bank was trained is unknown: it has no loss, no steps, no seconds.

    Attributes:
        digest: SHA-256 of the bank's weights.
        memory_digest: SHA-256 of the task state; None if the method stores none.
        router_digest: SHA-256 of the router statistics; None if there are none.
        records_digest: Digest of the training records.
        images_digest: Digest of the training images; None if an earlier version trained the task.
        validation_digest: Digest of the validation records, if they decided the bank.
        kept_step: The step of the best validation, if its bank is the one kept; None: the last step.
        validation: What was measured then, by metric.
        config_digest: Digest of the configuration that decided the bank.
        model_digest: Digest of the base model's files.
        bank_layer: `fused` or `peft`.
        kernels: `liger` or `torch`.
        recomputed_layers: The number of decoder layers whose activations were recomputed.
        switched_off: Optimisations that this base model does not use.
        template_date: The date that the chat template is given instead of today's; None if it asks for none.
        padding: Shares of padded positions.
        weights: Weights of the penalties after the last step.
        stream: The tasks up to this one, in order. Version 0.1.0 wrote neither this nor the next four.
        method: The bank's method.
        rank: The bank's rank.
        processes: The number of processes that trained the bank, each with a device of its own.
        parameters: The number of parameters of the bank.
    """

    model_config = ConfigDict(extra="allow")

    digest: str
    memory_digest: str | None = None
    router_digest: str | None = None
    records_digest: str | None = None
    images_digest: str | None = None
    validation_digest: str | None = None
    kept_step: int | None = None
    validation: dict[str, float] | None = None
    config_digest: str | None = None
    model_digest: str | None = None
    steps: int
    train_loss: float | None
    seconds: float
    padding: dict[str, float] | None = None
    switched_off: tuple[str, ...] = ()
    template_date: str | None = None
    finished: str
    bank_layer: str | None = None
    kernels: str | None = None
    recomputed_layers: int | None = None
    frozen_bank_bytes: int = 0
    weights: dict[str, float] | None = None
    imported: Imported | None = None
    stream: tuple[str, ...] | None = None
    method: str | None = None
    rank: int | None = None
    processes: int | None = None
    parameters: int | None = None

    @property
    def device_hours(self) -> float | None:
        """Training time times the number of devices, in hours; None if that number is unknown."""
        if not self.seconds:
            return 0.0
        return self.seconds * self.processes / 3600 if self.processes else None


class Answering(Part):
    """Which banks answer, for a method outside the package, so that a run can be read without the method's code.

    Attributes:
        stages: The stages that can answer, from 1.
        prefix: By stage and task of the stream, the numbers, from 1, of the banks that answer by `prefix`.
        all: The same by `all`.
    """

    stages: tuple[int, ...]
    prefix: tuple[tuple[tuple[int, ...], ...], ...]
    all: tuple[tuple[tuple[int, ...], ...], ...]


class Forced(Part):
    """A launch with `--force` that continued with other settings: when, after which tasks, and what it changed."""

    when: str
    finished: tuple[str, ...]
    changed: tuple[str, ...]


class RunLedger(StateFile):
    """`ledger.json` of a run folder. Before the first launch everything but run and method is empty."""

    MEND: ClassVar[str] = "restore it from a copy, or move the run folder away to start again"
    model_config = ConfigDict(extra="allow")

    run: str
    method: str
    tasks: dict[str, TaskEntry]
    config_digest: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    git: dict[str, Any] | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    forced: tuple[Forced, ...] = ()
    answering: Answering | None = None

    @property
    def seconds(self) -> float:
        """The training time of all tasks."""
        return sum(entry.seconds for entry in self.tasks.values())
