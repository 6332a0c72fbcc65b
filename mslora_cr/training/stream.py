"""The stream: one bank per task, one after another; killed at any moment, the same command resumes."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from mslora_cr import llava_med
from mslora_cr.bank_stack import BankStack
from mslora_cr.banks import MEMORY, STATISTICS, file_digest, save_bank
from mslora_cr.config import ConfigError, StreamConfig, Task
from mslora_cr.config_file import training_fields
from mslora_cr.data.collator import TrainingCollator, TrainingSamples, UnitedSamples
from mslora_cr.data.images import check_images, resolve_image
from mslora_cr.data.records import DataError, TrainingRecords
from mslora_cr.methods import METHODS, needs_task
from mslora_cr.methods.base import Method, Setup
from mslora_cr.router import TaskStatistics
from mslora_cr.runtime import (
    base_digest,
    cached_tower,
    check_hosts,
    load_base,
    preprocessing,
    router_statistics,
    start_processes,
    task_folder,
    task_image_roots,
)
from mslora_cr.training.distributed import (
    float32_value,
    free_memory,
    from_first_rank,
    own_device,
    partition,
    prepare_deepspeed,
    rank,
    release,
    world_size,
    zero_stage,
)
from mslora_cr.training.ledger import Ledger
from mslora_cr.training.processes import first_rank_first
from mslora_cr.training.trainer import BankTrainer, JsonLinesCallback, checkpoints, refuse_other_launch, writing
from mslora_cr.workers import cores


@dataclass(frozen=True)
class TaskPlan:
    """What training a task will do."""

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


@dataclass(frozen=True)
class StreamRun:
    """What the tasks of one launch share."""

    config: StreamConfig
    fields: dict[str, Any]
    """The `training` section, checked."""
    ledger: Ledger
    records: dict[str, TrainingRecords]
    """By task, of all tasks whose samples are read."""
    model_digest: str
    force: bool

    def made_from(self, task: Task) -> dict[str, str]:
        """Digests of what decides a task's bank: a checkpoint inside the task is of no use to another."""
        sources = METHODS[self.config.method].sources(self.config, task)
        return {
            "configuration": self.config.training_digest(task),
            "base model": self.model_digest,
            "training records": " ".join(self.records[source.name].digest for source in sources),
        }


def train(config: StreamConfig, only: str | None = None, force: bool = False) -> None:
    """Train every task of the stream that is not done yet, or only the one named.

    Everything that can be wrong is checked before the first step: configuration, records, images, earlier banks.

    Raises:
        ConfigError, DataError, ModelError, BankError: with what is wrong, where, and how to mend it.
    """
    fields = start_processes(config)
    refuse_what_cannot_train(config, fields)
    if zero_stage(fields.get("deepspeed")):
        prepare_deepspeed(own_device(config.model.device).type == "cuda")
    tasks = tasks_to_train(config, only)
    ledger = Ledger.read(config)
    pending = [task for task in tasks if not ledger.done(task.name)]
    records = {}
    for source in (source for task in pending for source in METHODS[config.method].sources(config, task)):
        if source.name not in records:
            records[source.name] = TrainingRecords(task_folder(config, source) / "train.json")
    refuse_changed_records(ledger, records)
    if only and pending:
        ledger.banks(config, frozen_tasks(config, pending[0]) or previous_task(config, pending[0]))
    for task in pending:  # only validated here: DeepSpeed must not know of a task before its model is built
        training_arguments(config, task, {**fields, "deepspeed": None})
    model_digest = base_digest(config)
    check_hosts(config.run_dir, shared_facts(config, records, ledger, fields, model_digest))

    def prepare() -> None:
        ledger.refuse_differences(config, model_digest, force)  # in a moment; images may take minutes
        check_task_images(config, records)
        ledger.open(config, model_digest, force)

    first_rank_first(prepare)
    if not tasks and rank() == 0:
        print(f"{config.method} trains nothing; evaluate it directly")
    run = StreamRun(config, fields, ledger, records, model_digest, force)
    progress = tqdm(tasks, desc="stream", unit="task", disable=rank() != 0)
    for task in progress:
        progress.set_postfix_str(task.name)
        if task in pending:
            train_task(run, task)
        elif rank() == 0:
            shutil.rmtree(work_folder(config, task), ignore_errors=True)  # a run killed right after the ledger
            print(f"{task.name}: already done, skipped")


def refuse_what_cannot_train(config: StreamConfig, fields: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: settings that are right by themselves, but not together.
    """
    if config.model.quantization and zero_stage(fields.get("deepspeed")) == 3:
        raise ConfigError(
            "training.deepspeed: ZeRO-3 cannot shard a quantised base; use zero2, or no model.quantization"
        )
    method = METHODS[config.method]
    penalised = type(method).penalty is not Method.penalty
    if fields.get("fp16") and penalised and any(method.regularizes(config, task) for task in method.trained(config)):
        raise ConfigError(
            "training.fp16 scales the loss, so that a penalty's gradient, which is added behind it, would all but "
            f"vanish; use training.bf16, or a method without a penalty instead of {config.method}"
        )


def shared_facts(
    config: StreamConfig,
    records: dict[str, TrainingRecords],
    ledger: Ledger,
    fields: dict[str, Any],
    model_digest: str,
) -> dict[str, Any]:
    """What all ranks of a run must find alike, wherever they run."""
    return {
        "the configuration": config.training_digest(),
        "training.deepspeed": zero_stage(fields.get("deepspeed")),
        "the base model's files": model_digest,
        "the training records": {name: found.digest for name, found in records.items()},
        "the finished tasks": {name: entry["digest"] for name, entry in ledger.content["tasks"].items()},
        "the checkpoints": {
            name: [path.name for path in checkpoints(work_folder(config, config.task(name)))] for name in records
        },
    }


def plan(config: StreamConfig) -> tuple[list[TaskPlan], int]:
    """The resolved plan of every task, and how many parameters a bank trains. Loads no weights.

    Raises:
        ConfigError, DataError: as `train` would.
    """
    fields = training_fields(config)
    ledger = Ledger.read(config)
    plans = []
    method = METHODS[config.method]
    for task in method.trained(config):
        sources = method.sources(config, task)
        counts = [len(TrainingRecords(task_folder(config, source) / "train.json")) for source in sources]
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
                steps=update_steps(visited, epochs, per_device, accumulation),
                learning_rate=task.learning_rate,
                frozen_banks=[earlier.name for earlier in frozen_tasks(config, task)],
                penalties=method.regularizes(config, task),
                done=ledger.done(task.name),
            )
        )
    linears = llava_med.language_linear_shapes(Path(config.model.path))
    return plans, sum(config.lora.rank * (rows + columns) for rows, columns in linears)


def batch_shape(task: Task, fields: dict[str, Any]) -> tuple[int, int]:
    """Samples per process and micro-batch, and micro-batches per update, that give the task's global batch size.

    `training.per_device_train_batch_size` is the most that a process may take at once.

    Raises:
        ConfigError: the batch size cannot be shared by the processes, or no sample may be taken at once.
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


def update_steps(records: int, epochs: float, per_device: int, accumulation: int) -> int:
    """Optimizer steps of a task, as the Trainer counts them."""
    batches = math.ceil(records / (per_device * world_size()))
    return math.ceil(epochs * max(1, math.ceil(batches / accumulation)))


def tasks_to_train(config: StreamConfig, only: str | None) -> list[Task]:
    """The tasks that get a bank, or only the one named.

    Raises:
        ConfigError: there is no task of that name, or the method gives it no bank.
    """
    tasks = METHODS[config.method].trained(config)
    if only is None:
        return tasks
    name = config.task(only).name
    chosen = [task for task in tasks if task.name == name]
    if not chosen:
        trained = ", ".join(task.name for task in tasks) or "nothing"
        raise ConfigError(f"--task {name}: method {config.method} trains no bank for it; it trains {trained}")
    return chosen


def frozen_tasks(config: StreamConfig, task: Task) -> list[Task]:
    """The earlier tasks whose banks take part, frozen, while this one trains."""
    return config.stream[: task.index] if METHODS[config.method].folds_earlier else []


def previous_task(config: StreamConfig, task: Task) -> list[Task]:
    """The task whose bank this one starts from, if any."""
    return config.stream[: task.index][-1:] if METHODS[config.method].continues else []


def refuse_changed_records(ledger: Ledger, records: dict[str, TrainingRecords]) -> None:
    """Raise if a finished task whose samples are still needed has other records now.

    Raises:
        DataError: names the file.
    """
    for name, found in records.items():
        entry = ledger.content["tasks"].get(name)
        if entry is not None and entry["records_digest"] not in (None, found.digest):
            raise DataError(f"{found.path} has changed since {name!r} was trained on it; restore it to continue")


def check_task_images(config: StreamConfig, records: dict[str, TrainingRecords]) -> None:
    """Find and, unless `data.check_images` is off, decode every image that training will read.

    Raises:
        DataError: names the bad ones, with the record that asks for the first.
    """
    paths: dict[Path, tuple[TrainingRecords, int]] = {}
    for task_name, found in records.items():
        roots = task_image_roots(config, config.task(task_name))
        for index, record in enumerate(found):
            for name in record.images if config.data.images == "all" else record.images[:1]:
                try:
                    paths.setdefault(resolve_image(name, roots), (found, index))
                except DataError as error:
                    raise DataError(f"{found.path}: {found.place(index)}: {error}") from None
    if not config.data.check_images or not paths:
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    bad = check_images(list(paths), cores(), progress=True, cache=config.run_dir / "images-checked.bin")
    if bad:
        asked = ((path, problem, *paths[path]) for path, problem in bad[:10])
        lines = [f"{found.path}: {found.place(index)}: {path}: {problem}" for path, problem, found, index in asked]
        raise DataError(f"{len(bad)} of {len(paths)} images cannot be read\n  " + "\n  ".join(lines))


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
        "output_dir": str(work_folder(config, task)),
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


def work_folder(config: StreamConfig, task: Task) -> Path:
    """Where checkpoints inside a task are kept until it is done."""
    return config.run_dir / "work" / task.name


def train_task(run: StreamRun, task: Task) -> None:
    """Train one task's bank from its last checkpoint, if it has one, save it, and enter it in the ledger.

    The base model is loaded afresh, so a task does not depend on which ones this process has trained before.
    """
    trainer, router = build_trainer(run, task)
    # A shared file system may show other hosts an older state, of checkpoints here and of the ledger below.
    found = from_first_rank(checkpoints(work_folder(run.config, task)))
    if found:
        refuse_other_launch(found[-1], trainer.args, run.made_from(task), run.force)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    save_task(run, task, trainer, router)
    run.ledger.content = from_first_rank(run.ledger.content)
    if "wandb" in trainer.args.report_to:
        import wandb

        wandb.finish()  # else the next task would be logged into this one's W&B run
    release(trainer)
    del trainer
    free_memory()  # before the next task's model is loaded beside this one's


def build_trainer(run: StreamRun, task: Task) -> tuple[BankTrainer, TaskStatistics | None]:
    """Base model, frozen banks, the live one and its trainer; and what a router needs to know of the task."""
    config, method = run.config, METHODS[run.config.method]
    sharded = zero_stage(run.fields.get("deepspeed")) == 3
    device = own_device(config.model.device)
    # Everything is built before DeepSpeed knows of the task: transformers would partition what it loads afterwards.
    base = load_base(config, "cpu" if sharded else device)
    router = router_statistics(config, task, run.records[task.name], base) if needs_task(config) else None
    samples = training_samples(run, task, base)
    frozen = run.ledger.banks(config, frozen_tasks(config, task))
    stack = BankStack(base.model, config.lora.fold)
    stack.freeze(frozen)
    initial = run.ledger.banks(config, previous_task(config, task))
    set_seed(config.seed + task.index)
    stack.add_live(
        config.lora.rank,
        config.lora.alpha,
        config.lora.dropout,
        initial[0] if initial else None,
        method.experts(config),
    )
    setup = Setup(config, task, run.ledger, device)
    regularizes = method.regularizes(config, task)
    penalty = method.penalty(setup, frozen) if regularizes else None
    del frozen  # folded into the model and held by the penalty; on the host it would be a copy per process
    order = method.order(config, task, samples.counts, run.ledger)
    args = training_arguments(config, task, run.fields, order is not None)
    # Its default is inside the work folder, which goes when the task is done.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.run_dir / "logs" / "tensorboard" / task.name)
    if sharded:
        partition(stack.model, args.hf_deepspeed_config.config)
    trainer = BankTrainer(
        stack=stack,
        samples=samples,
        collator=TrainingCollator(base.tokenizer.pad_token_id),
        args=args,
        bank_shape=(config.lora.rank, config.lora.alpha),
        made_from=run.made_from(task),
        order=order,
        penalty=penalty,
        distillation=method.distillation(setup) if regularizes else None,
        callbacks=[JsonLinesCallback(config.run_dir / "logs" / f"{task.name}.jsonl")],
    )
    return trainer, router


def training_samples(run: StreamRun, task: Task, base: llava_med.LlavaMed) -> UnitedSamples:
    """The samples that a task trains on; with `data.cache_image_features`, it caches their images' features first."""
    tower = cached_tower(run.config, base)
    prepare = preprocessing(run.config, base, tower)
    parts = [
        TrainingSamples(run.records[source.name], task_image_roots(run.config, source), prepare)
        for source in METHODS[run.config.method].sources(run.config, task)
    ]
    if tower is not None:
        images = (prepare.image_paths(part.records, part.roots) for part in parts)
        tower.fill(list(itertools.chain.from_iterable(images)), int(run.fields.get("dataloader_num_workers", 0)))
    return UnitedSamples(parts)


def save_task(run: StreamRun, task: Task, trainer: BankTrainer, router: TaskStatistics | None) -> None:
    """Write a trained bank with what is kept beside it, and enter it in the ledger; to be called on every rank."""
    config, ledger = run.config, run.ledger
    mean_loss, padding = trainer.mean_loss(), trainer.padding()
    kept = METHODS[config.method].memory(Setup(config, task, ledger, own_device(config.model.device)), trainer)
    metadata = {"modality": task.modality, "index": task.index, "method": config.method, "run": config.run}
    bank = trainer.stack.snapshot(task.name, config.lora.rank, config.lora.alpha, metadata, float32_value)
    if not trainer.args.should_save:
        return
    folder = ledger.bank_folder(task.name)
    with writing(folder):
        beside = {MEMORY: kept, STATISTICS: router.tensors() if router else {}}
        digest = save_bank(bank, folder, config.lora.dropout, beside)
    made_from = run.made_from(task)
    entry = {
        "digest": digest,
        "memory_digest": file_digest(folder / MEMORY) if kept else None,
        "router_digest": file_digest(folder / STATISTICS) if router else None,
        "records_digest": run.records[task.name].digest,
        "config_digest": made_from["configuration"],
        "model_digest": made_from["base model"],
        "steps": trainer.state.global_step,
        "train_loss": mean_loss,
        "seconds": round(trainer.seconds, 3),
        "padding": padding,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "frozen_bank_bytes": trainer.penalty.frozen_bytes if trainer.penalty else 0,
        "weights": trainer.penalty.weights if trainer.penalty else None,
    }
    ledger.record(task.name, entry)
    shutil.rmtree(work_folder(config, task), ignore_errors=True)
