"""transformers' TrainingArguments of a task."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.runs.ledger import work_folder
from mslora_cr.stream.plan import batch_shape
from mslora_cr.stream.rehearsal import rehearse


def training_arguments(
    config: StreamConfig, task: Task, fields: dict[str, Any], ordered: bool = False
) -> TrainingArguments:
    """TrainingArguments of one task; starts the process group in a run of several processes.

    Args:
        ordered: the method orders all visits of samples itself, so the Trainer takes them as they come, once.

    Raises:
        ConfigError: transformers refuses them, or checkpointing is to re-enter.
    """
    per_device, accumulation = batch_shape(task, fields)
    chosen = {
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 1,
        "report_to": "none",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "ddp_find_unused_parameters": False,  # every batch uses every matrix of the bank
        "run_name": f"{config.run}/{task.name}",
        **fields,
        "gradient_checkpointing": bool(fields.get("gradient_checkpointing")),  # the trainer takes how many layers
        "output_dir": str(work_folder(config.run_dir, task.name)),
        "num_train_epochs": 1.0 if ordered else task.epochs,
        "learning_rate": task.learning_rate,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "seed": config.seed,
        "use_cpu": config.model.device == "cpu" or not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # The trainer checks every loss itself and stops; the Trainer would leave it out of the average.
        "logging_nan_inf_filter": False,
    }
    if ordered:
        chosen["train_sampling_strategy"] = "sequential"
    if chosen.get("tf32") and not torch.cuda.is_available():
        warnings.warn("training.tf32 has no effect without a GPU", stacklevel=2)
        del chosen["tf32"]
    try:
        args = TrainingArguments(**chosen)
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # refuses where its package is missing; otherwise the Trainer would, with the model loaded
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"training: {error}") from None
    rehearse(args)
    args._n_gpu = min(args.n_gpu, 1)  # on several, a process without a launcher would split batches by DataParallel
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ConfigError(
            "training.gradient_checkpointing_kwargs.use_reentrant: true would run a backward pass through the "
            "vision tower at every step; set it to false"
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            "training.train_sampling_strategy: batch_rebalance would decode every image to measure the samples; "
            "use group_by_length, or random (the default)"
        )
    return args
