"""The validation records with which a task is measured during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.config.validation import LOSS
from mslora_cr.data.datasets import ConcatEvalDataset, ConcatTrainDataset, EvalDataset, TrainDataset
from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.records import DataError
from mslora_cr.data.tasks import VALIDATION, task_image_roots, validation_records
from mslora_cr.data.validation import ValidationRecords
from mslora_cr.distributed.deepspeed import zero_stage
from mslora_cr.generation.run import Decoding
from mslora_cr.methods.base import method_of
from mslora_cr.metrics.published import score_answers
from mslora_cr.training.arguments import batch_shape
from mslora_cr.training.validation import ValidationAnswer, ValidationSet


def validated_tasks(config: StreamConfig, task: Task) -> list[Task]:
    """Return the tasks whose records measure a task's training: its own, or all if it trains on all at once."""
    method = method_of(config)
    return method.sources(config, task) if method.all_at_once else [task]


def read_validation(
    config: StreamConfig, fields: Mapping[str, Any], tasks: Sequence[Task]
) -> dict[str, ValidationRecords]:
    """Read the validation records for the training of some tasks, by task; empty if training does not validate.

    Args:
        fields: The `training` section, checked.

    Raises:
        DataError: A task has no validation records.
        ConfigError: They cannot give `training.metric_for_best_model`.
    """
    if fields.get("eval_strategy", "no") == "no":
        return {}
    found: dict[str, ValidationRecords] = {}
    measured = {source.name: source for task in tasks for source in validated_tasks(config, task)}
    for name, source in measured.items():
        records = validation_records(config, source)
        if records is None:
            raise DataError(
                f"{name} has nothing to validate on: its folder has no {VALIDATION}, and data.validation names no "
                "share of its training records; set data.validation=0.1, or training.eval_strategy=no"
            )
        found[name] = records
    metric = fields.get("metric_for_best_model", LOSS)
    for name, records in found.items():
        if metric != LOSS and metric not in (scores := _score_names(records)):
            raise ConfigError(
                f"training.metric_for_best_model is {metric!r}, of which the validation questions of {name} give no "
                f"figure; there are {', '.join([LOSS, *scores])}"
            )
    return found


def _score_names(records: ValidationRecords) -> list[str]:
    """Return the scores that questions of these kinds have."""
    scores = score_answers(ValidationAnswer("", record.gt, record.answer_type) for record in records.questions)
    return [*scores.metrics, *scores.added]


def validation_set(
    config: StreamConfig,
    task: Task,
    fields: Mapping[str, Any],
    records: Mapping[str, ValidationRecords],
    processor: InputProcessor,
) -> ValidationSet | None:
    """Return the validation data of a task; None if training does not validate."""
    tasks = [measured for measured in validated_tasks(config, task) if measured.name in records]
    if not tasks:
        return None
    by_task = [(records[measured.name], task_image_roots(config, measured)) for measured in tasks]
    samples = [TrainDataset(part.conversations, roots, processor) for part, roots in by_task]
    questions = [EvalDataset(part.questions, roots, processor) for part, roots in by_task]
    return ValidationSet(
        ConcatTrainDataset(samples),
        batch_shape(task, dict(fields))[0],
        ConcatEvalDataset(questions),
        Decoding(
            config.evaluation.max_new_tokens,
            config.evaluation.batch_size,
            Path(config.model.path).name,
            workers=int(fields.get("dataloader_num_workers", 0)),
        ),
        together=zero_stage(fields.get("deepspeed")) == 3,
    )
