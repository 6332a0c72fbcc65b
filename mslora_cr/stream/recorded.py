"""Which banks answer, as recorded in the run folder: enough to read and export a run without its method's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from mslora_cr.config.methods import OUTSIDE, load_method, method_names
from mslora_cr.config.schema import StreamConfig
from mslora_cr.methods.base import AnsweringMethod, Method, method_of
from mslora_cr.runs.entries import Answering
from mslora_cr.runs.ledger import Ledger


@dataclass(frozen=True)
class RecordedMethod:
    """A method outside the package, from what a run's ledger records about its answers."""

    record: Answering

    def stages(self, learned: Sequence[int], tasks: int) -> Sequence[int]:
        """As `Method.stages`, for the banks that the run has."""
        return [stage for stage in self.record.stages if stage <= tasks]

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        """As `Method.banks`."""
        table = self.record.all if banks_by == "all" else self.record.prefix
        return list(table[stage - 1][task - 1])


def answering_method(config: StreamConfig) -> AnsweringMethod:
    """Return a run's method, or the ledger's record of one whose code may not be imported.

    Raises:
        UntrustedMethodError: The ledger has no record of it either.
    """
    if config.knows_method:
        return method_of(config)
    ledger = Ledger.read(config).content
    if ledger.answering is not None and _fits(ledger.answering, len(config.tasks)):
        return RecordedMethod(ledger.answering)
    if ledger.method in method_names():  # This method trained the banks, whatever the configuration says now.
        return cast(Method, load_method(ledger.method))
    return method_of(config)


def builds_on_earlier(config: StreamConfig) -> bool:
    """Return whether a run's banks build on each other, so that other banks than a task's own answer it."""
    method = answering_method(config)
    if isinstance(method, Method):
        return method.keeps_frozen_adapters or method.init_from_previous
    numbers = range(1, len(config.tasks) + 1)
    stages = method.stages(numbers, len(numbers))
    return any(method.banks(task, stage, "prefix") != [task] for task in numbers for stage in stages if task <= stage)


def record_answering(config: StreamConfig, ledger: Ledger) -> None:
    """Record in the ledger which banks answer, if the method is outside the package."""
    if not OUTSIDE.fullmatch(config.method):
        return
    method, numbers = method_of(config), range(1, len(config.tasks) + 1)
    learned = [task.index + 1 for task in config.stream if task.name in ledger.tasks]
    tables = {
        by: tuple(tuple(tuple(method.banks(task, stage, by)) for task in numbers) for stage in numbers)
        for by in ("prefix", "all")
    }
    ledger.note_answering(Answering(stages=tuple(method.stages(learned, len(numbers))), **tables))


def _fits(record: Answering, tasks: int) -> bool:
    """Return whether a record fits a stream of this many tasks: ledgers may come from elsewhere."""
    allowed = range(1, tasks + 1)
    rows = [row for table in (record.prefix, record.all) for row in table]
    numbers = [number for row in rows for banks in row for number in banks]
    return (
        len(record.prefix) == len(record.all) == tasks
        and all(len(row) == tasks for row in rows)
        and all(number in allowed for number in (*numbers, *record.stages))
    )
