"""The plan of a training run: tasks, batches, steps. No weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mslora_cr.config.load import training_fields
from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.data.tasks import training_records
from mslora_cr.methods.base import method_of
from mslora_cr.models.shapes import language_linear_shapes, projector_size
from mslora_cr.runs.ledger import Ledger
from mslora_cr.training.arguments import batch_shape, update_steps


@dataclass(frozen=True)
class TaskPlan:
    """The plan for training a task."""

    task: str
    modality: str
    records: int
    epochs: float
    per_device_batch_size: int
    accumulation_steps: int
    steps: int
    learning_rate: float
    frozen_banks: list[str]
    penalties: bool
    done: bool


def plan(config: StreamConfig) -> tuple[list[TaskPlan], int]:
    """Return the resolved plan of every task, and the number of parameters that a bank trains. No weights are loaded.

    Raises:
        ConfigError, DataError: As `train` would.
    """
    fields = training_fields(config)
    ledger = Ledger.read(config)
    plans = []
    method = method_of(config)
    for task in method.trained(config):
        sources = method.sources(config, task)
        counts = [len(training_records(config, source)) for source in sources]
        order = method.order(config, task, counts, ledger)
        visited, epochs = (len(order), 1.0) if order is not None else (counts[0], task.epochs)
        per_device, accumulation = batch_shape(task, fields)
        plans.append(
            TaskPlan(
                task=task.name,
                modality=task.modality,
                records=sum(counts),
                epochs=task.epochs,
                per_device_batch_size=per_device,
                accumulation_steps=accumulation,
                steps=0 if task.reuse else update_steps(visited, epochs, per_device, accumulation),
                learning_rate=task.learning_rate,
                frozen_banks=[earlier.name for earlier in frozen_tasks(config, task)],
                penalties=method.regularizes(config, task),
                done=ledger.done(task.name),
            )
        )
    path = Path(config.model.path)
    a, b = (half in method.trained_halves for half in (0, 1))  # The shapes are (rank, columns) and (rows, rank).
    linears = language_linear_shapes(path).values()
    trained = sum(config.lora.rank * (a * columns + b * rows) for rows, columns in linears)
    return plans, trained + (projector_size(path) if config.lora.projector_learning_rate is not None else 0)


def tasks_to_train(config: StreamConfig, only: Sequence[str] = ()) -> list[Task]:
    """Return the tasks that get a bank, or those of them that are named, in the stream's order.

    Raises:
        ConfigError: There is no task of a name, or the method gives it no bank.
    """
    tasks = method_of(config).trained(config)
    names = {config.task(name).name for name in only}
    for name in sorted(names - {task.name for task in tasks}):
        trained = ", ".join(task.name for task in tasks) or "nothing"
        raise ConfigError(f"--task {name}: method {config.method} trains no bank for it; it trains {trained}")
    return [task for task in tasks if not names or task.name in names]


def banks_needed(config: StreamConfig, task: Task) -> list[Task]:
    """Return the tasks whose banks must exist before this one trains."""
    return frozen_tasks(config, task) or previous_task(config, task)


def frozen_tasks(config: StreamConfig, task: Task) -> list[Task]:
    """Return the earlier tasks whose banks are active and frozen while this one trains."""
    return config.stream[: task.index] if method_of(config).keeps_frozen_adapters else []


def previous_task(config: StreamConfig, task: Task) -> list[Task]:
    """Return the task from whose bank this one starts, if any: the one before it, or the site that it extends or
    reuses.
    """
    method, earlier = method_of(config), config.stream[: task.index]
    if method.init_from_previous:
        return earlier[-1:]
    if not (task.extend or task.reuse) or method.keeps_frozen_adapters:
        return []
    return [site for site in earlier if task.same_as in (site.name, site.same_as)][-1:]
