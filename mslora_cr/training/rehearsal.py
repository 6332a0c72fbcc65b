"""Tries out settings that transformers accepts but its Trainer refuses once the model is loaded."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from mslora_cr.config.schema import ConfigError

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
