"""transformers' TrainingArguments of a task, its batches and its steps."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.config.validation import OWN_TRAINING_FIELDS
from mslora_cr.distributed.comm import world_size
from mslora_cr.runs.ledger import work_folder
from mslora_cr.training.trackers import check_trackers
from mslora_cr.utils.inherited import drop

log = logging.getLogger(__name__)

LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
"""Prefixes of the variables that `accelerate launch` sets from its user's own configuration."""
LEFTOVERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of MPI's launchers, from which accelerate takes a number of processes; none of them starts this program."""


def training_arguments(
    config: StreamConfig, task: Task, fields: dict[str, Any], ordered: bool = False, epoch_steps: int = 1
) -> TrainingArguments:
    """Return TrainingArguments of one task; start the process group in a run of several processes.

    Args:
        ordered: Whether the method orders all visits of samples itself, so that the Trainer takes them once, in that
            order.
        epoch_steps: Optimizer steps of an epoch, after which `eval_strategy: epoch` measures.

    Raises:
        ConfigError: Transformers refuses them, or checkpointing would be reentrant.
    """
    ignore_launcher_settings()
    per_device, accumulation = batch_shape(task, fields)
    chosen = {
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 1,
        "report_to": "none",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "ddp_find_unused_parameters": False,  # Every batch uses every matrix of the bank.
        "run_name": f"{config.run}/{task.name}",
        **fields,
        "gradient_checkpointing": bool(fields.get("gradient_checkpointing")),  # The trainer takes the number of layers.
        "output_dir": str(work_folder(config.run_dir, task.name)),
        "num_train_epochs": 1.0 if ordered else task.epochs,
        "learning_rate": task.learning_rate,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "seed": config.seed,
        "use_cpu": config.model.device == "cpu" or not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # The trainer checks every loss itself and stops; transformers' Trainer would leave it out of the average.
        "logging_nan_inf_filter": False,
    }
    if ordered:
        chosen["train_sampling_strategy"] = "sequential"
    if chosen.get("eval_strategy") == "epoch":
        # By steps, since the Trainer measures those before it saves: a run that resumes from the checkpoint at the end
        # of an epoch would never measure that epoch.
        chosen |= {"eval_strategy": "steps", "eval_steps": epoch_steps}
    if fields.get("patience"):
        chosen["restore_callback_states_from_checkpoint"] = True  # the count of validations
    for key in OWN_TRAINING_FIELDS:
        chosen.pop(key, None)
    if chosen.get("tf32") and not torch.cuda.is_available():
        warnings.warn("training.tf32 has no effect without a GPU", stacklevel=2)
        del chosen["tf32"]
    try:
        args = TrainingArguments(**chosen)
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # This refuses if a package is missing; otherwise the Trainer would, with the model loaded.
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"training: {error}") from None
    check_trackers(args.report_to)
    rehearse(args)
    # On several GPUs, a process without a launcher would split batches by DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
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


def ignore_launcher_settings() -> None:
    """Drop accelerate's settings from the environment, where a shell or `accelerate launch` put them.

    Precision, compilation, sharding and plugins belong to the configuration. In a run of one process, what launchers
    leave behind in a shell is dropped too: accelerate would wait for the other processes.
    """
    prefixes = LAUNCHER_SETTINGS + (LEFTOVERS if world_size() == 1 else ())
    if world_size() == 1 and "MASTER_ADDR" not in os.environ:
        prefixes += ("LOCAL_RANK",)
    _say_ignored(drop(prefixes))


@cache
def _say_ignored(given: str) -> None:
    if given:
        log.warning("the environment sets %s, which is ignored: the configuration's `training` decides", given)


def set_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Move parameters to groups with another learning rate; everything else in their groups stays the same.

    Args:
        optimizer: Before its first step.
        parameters: Some of its parameters.
        rate: Their learning rate.
    """
    moved = set(map(id, parameters))
    for group in list(optimizer.param_groups):
        theirs = [parameter for parameter in group["params"] if id(parameter) in moved]
        if theirs:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
            optimizer.add_param_group({**group, "params": theirs, "lr": rate})


def batch_shape(task: Task, fields: dict[str, Any]) -> tuple[int, int]:
    """Return the samples per micro-batch of a process, and micro-batches per update, for the task's global batch size.

    `training.per_device_train_batch_size` is the most that a process may take at once.

    Raises:
        ConfigError: The processes cannot divide the batch size, or no sample may be taken at once.
    """
    share, rest = divmod(task.batch_size, world_size())
    if rest:
        raise ConfigError(
            f"tasks.{task.name}.batch_size is {task.batch_size}, which {world_size()} processes cannot divide equally"
        )
    most = min(share, fields.get("per_device_train_batch_size", share))
    if most < 1:
        raise ConfigError(f"training.per_device_train_batch_size is {most}; use at least 1")
    per_device = max(size for size in range(1, most + 1) if share % size == 0)
    return per_device, share // per_device


def steps_per_epoch(samples: int, order: Sequence[int] | None, task: Task, fields: dict[str, Any]) -> int:
    """Return the optimizer steps of an epoch of a task.

    Args:
        order: All visits of its epochs, where the method orders them.
    """
    if order is None:
        return update_steps(samples, 1, *batch_shape(task, fields))
    return math.ceil(update_steps(len(order), 1, *batch_shape(task, fields)) / max(task.epochs, 1))


def update_steps(records: int, epochs: float, per_device: int, accumulation: int) -> int:
    """Return the optimizer steps of a task, as the Trainer counts them."""
    batches = math.ceil(records / (per_device * world_size()))
    return math.ceil(epochs * max(1, math.ceil(batches / accumulation)))


_STEPS = 100
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, ArithmeticError)
"""What optimizers, schedulers and loaders raise for settings that do not fit together."""


def rehearse(args: TrainingArguments) -> None:
    """Build the optimizer, the scheduler and a data loader of these arguments over one dummy parameter.

    Raises:
        ConfigError: One cannot be built; the message names the field.
    """
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ConfigError(
            "training.use_liger_kernel: liger-kernel is not installed; pip install liger-kernel, or unset it"
        )
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ConfigError(
            "training.lr_scheduler_type: reduce_lr_on_plateau would let validation change the learning rate; use "
            "training.keep: best and training.patience"
        )
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    try:
        # Optimizers of chosen layers look for these layers in the model, and this one has none.
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
        if not args.optim_target_modules:
            optimizer = kind(model.parameters(), **settings)
    except _REFUSALS as error:
        raise ConfigError(f"training.optim is {OptimizerNames(args.optim).value!r}: {_one_line(error)}") from None
    try:
        extra = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(_STEPS), _STEPS, extra)
    except _REFUSALS as error:
        given = f" with lr_scheduler_kwargs {extra}" if extra else ", without lr_scheduler_kwargs"
        raise ConfigError(
            f"training.lr_scheduler_type is {SchedulerType(args.lr_scheduler_type).value!r}{given}: {_one_line(error)}"
        ) from None
    try:
        DataLoader(
            [0],  # type: ignore[arg-type]  # anything with a length; no worker is started before the first sample
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
    except _REFUSALS as error:
        raise ConfigError(f"training.dataloader_…: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
