"""The stream: one bank per task, one after another. If it is killed at any moment, the same command resumes."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from mslora_cr.banks.fit import check_fits
from mslora_cr.banks.io import STATISTICS, TASK_STATE, load_bank, save_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.load import training_fields
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.collator import length_multiple
from mslora_cr.data.datasets import ConcatTrainDataset, TrainDataset
from mslora_cr.data.input_processor import Collate
from mslora_cr.data.sources.leaks import tell
from mslora_cr.data.tasks import TaskRecords, task_folder, task_image_roots, training_records
from mslora_cr.data.validation import ValidationRecords
from mslora_cr.distributed.comm import broadcast_object, get_device, rank
from mslora_cr.distributed.deepspeed import (
    free_memory,
    partition,
    prepare_deepspeed,
    release_trainer,
    zero_stage,
)
from mslora_cr.distributed.launch import run_on_rank0
from mslora_cr.methods.base import Setup, method_of, needs_task
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.cached_features import cached_features
from mslora_cr.models.describe import fixed_date, switched_off
from mslora_cr.models.family import family_of
from mslora_cr.models.kernels import used_kernels
from mslora_cr.models.language import language_linears
from mslora_cr.models.load import base_digest, input_processor_of, kernels_of, load_base
from mslora_cr.routing.fit import router_statistics
from mslora_cr.routing.lda import TaskStatistics
from mslora_cr.runs.differences import with_former_defaults
from mslora_cr.runs.environment import check_hosts
from mslora_cr.runs.ledger import Ledger, work_folder
from mslora_cr.runs.lock import launch
from mslora_cr.stream.checks import (
    check_images_unchanged,
    check_labels,
    check_projector,
    check_projectors,
    check_records_unchanged,
    check_task_images,
    check_trainable,
    say_fixed_date,
    shared_facts,
    training_image_digests,
    training_images,
    try_first_record,
    warn_of_large_images,
)
from mslora_cr.stream.plan import banks_needed, frozen_tasks, previous_task, tasks_to_train
from mslora_cr.stream.recorded import record_answering
from mslora_cr.stream.validation import read_validation, validated_tasks, validation_set
from mslora_cr.training.arguments import steps_per_epoch, training_arguments
from mslora_cr.training.callbacks import ConsoleCallback, JsonLinesCallback
from mslora_cr.training.checkpoints import check_same_launch, checkpoints, reading, writing
from mslora_cr.training.objective import Objective
from mslora_cr.training.passes import Passes
from mslora_cr.training.trackers import tracked
from mslora_cr.training.trainer import BankTrainer
from mslora_cr.training.validation import EarlyStop, ValidationSet
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_all_regular

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamRun:
    """The state that the tasks of one launch share."""

    config: StreamConfig
    fields: dict[str, Any]
    """The `training` section, checked."""
    ledger: Ledger
    records: dict[str, TaskRecords]
    """By task, for all tasks whose samples are read."""
    image_digests: dict[str, str]
    """By task, the digest of the images that its records show."""
    validation: dict[str, ValidationRecords]
    """By task, if training is measured on them."""
    model_digest: str
    force: bool

    def input_digests(self, task: Task) -> dict[str, str]:
        """Return the digests of what decides the task's bank: checkpoints inside it are useless for another bank."""
        sources = method_of(self.config).sources(self.config, task)
        validation = self.validation_digest(task)
        return {
            "configuration": self.config.training_digest(task),
            "base model": self.model_digest,
            "training records": " ".join(self.records[source.name].digest for source in sources),
            "training images": " ".join(self.image_digests[source.name] for source in sources),
        } | ({"validation records": validation} if validation else {})

    def validation_digest(self, task: Task) -> str | None:
        """Return the digest of a task's validation records, if they decide its bank."""
        if not self.config.validation_decides:
            return None
        return " ".join(self.validation[measured.name].digest for measured in validated_tasks(self.config, task))


def train(config: StreamConfig, only: Sequence[str] = (), force: bool = False) -> None:
    """Train every task of the stream that is not done yet, or only those named.

    Configuration, records, images and earlier banks are all checked before the first step.

    Raises:
        ConfigError, DataError, ModelError, BankError, StateError, LockedError: The message says what is wrong, where,
            and how to fix it.
    """
    config = with_former_defaults(config)
    fields = training_fields(config)
    with launch(config, config.run_dir):
        check_trainable(config, fields)
        if zero_stage(fields.get("deepspeed")):
            prepare_deepspeed(get_device(config.model.device).type == "cuda")
        tasks = tasks_to_train(config, only)
        ledger = Ledger.read(config)
        pending = [task for task in tasks if not ledger.done(task.name)]
        run = _open_run(config, fields, ledger, pending, alone=bool(only), force=force)
        if not tasks and rank() == 0:
            log.info("%s trains nothing; evaluate it directly", config.method)
        bar = progress_bar(tasks, desc="stream", unit="task", disable=rank() != 0)
        for task in bar:
            bar.set_postfix_str(task.name, refresh=False)
            if task in pending:
                train_task(run, task)
            elif rank() == 0:
                # A run that was killed right after it wrote the ledger leaves this folder.
                shutil.rmtree(work_folder(config.run_dir, task.name), ignore_errors=True)
                log.info("%s: already done, skipped", task.name)


def _open_run(
    config: StreamConfig, fields: dict[str, Any], ledger: Ledger, pending: Sequence[Task], alone: bool, force: bool
) -> StreamRun:
    """Check everything that the pending tasks need, and make the run folder this configuration's."""
    records = {}
    for source in (source for task in pending for source in method_of(config).sources(config, task)):
        if source.name not in records:
            records[source.name] = training_records(config, source)
            tell(source.name, task_folder(config, source), records[source.name].file_digest)
    validation = read_validation(config, fields, pending)
    check_records_unchanged(ledger, records)
    check_projector(config, fields, records)
    if alone:
        needed = {earlier.name: earlier for task in pending for earlier in banks_needed(config, task)}
        ledger.banks(config, [earlier for earlier in needed.values() if earlier not in pending])
    for task in pending:  # This only validates: DeepSpeed must not know of a task before its model is built.
        training_arguments(config, task, {**fields, "deepspeed": None})
    model_digest = base_digest(config)
    check_hosts(config.run_dir, shared_facts(config, records, validation, ledger, fields, model_digest))

    image_digests: dict[str, str] = {}

    def prepare() -> None:
        # This takes a moment, whereas images may take minutes.
        ledger.check_same_configuration(config, model_digest, force)
        images = training_images(config, records)
        image_digests.update(training_image_digests(images))
        check_images_unchanged(ledger, image_digests, records)
        check_task_images(config, records, images)
        say_fixed_date(config)
        asked = {name: part.conversations for name, part in validation.items()}
        check_task_images(config, asked, training_images(config, asked))
        check_labels(config, records)
        warn_of_large_images(config, records)
        ledger.open(config, model_digest, force)

    run_on_rank0(prepare)
    for name, part in validation.items() if rank() == 0 else ():
        log.info("%s: validated on %s of its %s validation records", name, len(part.questions), f"{part.available:,}")
    digests = broadcast_object(image_digests)
    return StreamRun(config, fields, ledger, records, digests, validation, model_digest, force)


def train_task(run: StreamRun, task: Task) -> None:
    """Train one task's bank from its last checkpoint, if there is one, save it, and enter it in the ledger.

    The base model is loaded afresh, so a task does not depend on which tasks this process has trained before.
    """
    trainer, router = build_trainer(run, task)
    # A shared file system may show other hosts an older state, here of checkpoints and below of the ledger.
    left = broadcast_object(checkpoints(work_folder(run.config.run_dir, task.name)))
    step = 0
    if left:
        with reading(str(left[-1])):
            check_all_regular(left[-1])
            step = TrainerState.load_from_json(str(left[-1] / TRAINER_STATE_NAME)).global_step
        check_same_launch(left[-1], trainer.args, run.input_digests(task), run.force)
    _say_where_it_starts(task, trainer, left)
    if not task.reuse:
        with tracked(trainer, run.config.run_dir / "logs", task.name, step):
            trainer.train(resume_from_checkpoint=str(left[-1]) if left else None)
    save_task(run, task, trainer, router)
    run.ledger.share()
    release_trainer(trainer)
    del trainer
    free_memory()  # This must come before the next task's model is loaded beside this one's.


def build_trainer(run: StreamRun, task: Task) -> tuple[BankTrainer, TaskStatistics | None]:
    """Build the base model, frozen banks, the trainable bank and its trainer; and compute the task's router
    statistics."""
    config, method = run.config, method_of(run.config)
    sharded = zero_stage(run.fields.get("deepspeed")) == 3
    device = get_device(config.model.device)
    # Everything is built before DeepSpeed knows of the task: transformers would partition what is loaded afterwards.
    base = load_base(config, "cpu" if sharded else device, kernels_of(config))
    router = None
    if needs_task(config):
        router = router_statistics(config, task, run.records[task.name], base, method.router_examples(config))
    samples, validation = task_data(run, task, base)
    collator = input_processor_of(config, base).collator(length_multiple(device))
    stack, objective = prepare_bank(run, task, base, samples, collator)
    if family_of(Path(config.model.path)).own_template and not sharded:
        try_first_record(base, samples, collator, device)
    order = method.order(config, task, samples.counts, run.ledger)
    steps = steps_per_epoch(len(samples), order, task, run.fields)
    args = training_arguments(config, task, run.fields, order is not None, steps)
    if sharded:
        partition(stack.model, args.hf_deepspeed_config.config, device, stack.external_parameters())
    trainer = BankTrainer(
        stack=stack,
        samples=samples,
        collator=collator,
        args=args,
        bank_shape=(config.lora.rank, config.lora.alpha),
        input_digests=run.input_digests(task),
        order=order,
        objective=objective,
        callbacks=[
            ConsoleCallback(task.name),
            JsonLinesCallback(config.run_dir / "logs" / f"{task.name}.jsonl"),
            *([EarlyStop(patience)] if (patience := run.fields.get("patience")) else []),
        ],
        checkpointing=run.fields.get("gradient_checkpointing", False),
        validation=validation,
        keep_best=run.fields.get("keep") == "best",
    )
    if rank() == 0:
        log.info("%s: banks' layers: %s; kernels: %s", task.name, stack.layer, used_kernels(base.model))
    return trainer, router


def prepare_bank(
    run: StreamRun, task: Task, base: BaseModel, samples: ConcatTrainDataset, collator: Collate
) -> tuple[BankStack, Objective]:
    """Return the base with its frozen banks and the task's initial bank, and the terms beside the cross entropy."""
    config, method = run.config, method_of(run.config)
    rank_and_alpha = config.lora.rank, config.lora.alpha
    setup = Setup(config, task, run.ledger, get_device(config.model.device))
    # These are merged into the model, and the penalty holds them; kept on the host they would be a copy per process.
    frozen = run.ledger.banks(config, frozen_tasks(config, task))
    # ZeRO-3 gives each rank its part of the first rank's weights. The other ranks' weights are the file's pages, which
    # all ranks of a host share until one writes to them.
    unmerged = frozen if zero_stage(run.fields.get("deepspeed")) == 3 and rank() else []
    stack = BankStack(base.model, config.lora.fold, kind=method.adapter(config))
    stack.set_frozen(frozen, merge=not unmerged)
    previous = run.ledger.banks(config, previous_task(config, task))
    initial = stack.continue_from(previous[0]) if previous else None
    set_seed(config.seed + task.index)
    check_projectors([*frozen, *previous], config.lora.projector_learning_rate is not None)
    stack.add_trainable(*rank_and_alpha, config.lora.dropout, initial, config.lora.projector_learning_rate)
    still_to_merge = unmerged if config.lora.fold == "merge" else []
    passes = Passes(stack, samples, collator, config.seed, unmerged=still_to_merge)
    matrices = method.initial(setup, stack.trainable(), passes)
    if matrices is not None:
        stack.load_trainable(replace(stack.snapshot(task.name, *rank_and_alpha), matrices=matrices))
    stack.train_only(method.trained_halves)
    if not method.regularizes(config, task):
        return stack, Objective()
    penalty = method.penalty(setup, frozen) if method.has_penalty else None
    return stack, Objective(penalty, method.distillation(setup))


def _say_where_it_starts(task: Task, trainer: BankTrainer, left: Sequence[Path]) -> None:
    """Log the step at which a task resumes, and replace transformers' progress with our own."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if left and rank() == 0:
        log.info("%s: resumes after step %s, from %s", task.name, left[-1].name.rpartition("-")[2], left[-1])


def task_data(run: StreamRun, task: Task, base: BaseModel) -> tuple[ConcatTrainDataset, ValidationSet | None]:
    """Return the samples on which a task trains, and what it is measured on. With `data.cache_image_features`, their
    images' features are cached first.
    """
    features = cached_features(run.config, base, run.config.lora.projector_learning_rate is not None)
    processor = input_processor_of(run.config, base, features)
    parts = [
        TrainDataset(run.records[source.name], task_image_roots(run.config, source), processor)
        for source in method_of(run.config).sources(run.config, task)
    ]
    validation = validation_set(run.config, task, run.fields, run.validation, processor)
    if features is not None:
        images = (
            processor.image_paths(part.records, part.roots)
            for part in [*parts, *(validation.samples.parts if validation else [])]
        )
        features.fill(list(itertools.chain.from_iterable(images)), int(run.fields.get("dataloader_num_workers", 0)))
    return ConcatTrainDataset(parts), validation


def save_task(run: StreamRun, task: Task, trainer: BankTrainer, router: TaskStatistics | None) -> None:
    """Write a trained bank with everything stored beside it, and enter it in the ledger. Call it on every rank."""
    config, ledger = run.config, run.ledger
    mean_loss, padding = trainer.mean_loss(), trainer.padding()
    method, setup = method_of(config), Setup(config, task, ledger, get_device(config.model.device))
    task_state = method.task_state(setup, trainer.passes) if method.has_task_state else {}
    metadata = {"modality": task.modality, "index": task.index, "method": config.method, "run": config.run}
    metadata |= {"base_model": {"architecture": trainer.stack.architecture, "digest": run.model_digest}}
    bank = trainer.stored_bank(task.name, metadata)
    if not trainer.args.should_save:
        return
    folder = ledger.bank_folder(task.name)
    with writing(folder):
        extra = {TASK_STATE: task_state, STATISTICS: router.tensors() if router else {}}
        digest = save_bank(bank, folder, config.lora.dropout, extra)
    check_fits(load_bank(folder), language_linears(trainer.stack.base), trainer.stack.architecture)
    ledger.enter(
        config,
        task,
        digest,
        records_digest=run.records[task.name].digest,
        images_digest=run.image_digests[task.name],
        validation_digest=run.validation_digest(task),
        kept_step=trainer.best.step if trainer.best else None,
        validation=trainer.best.metrics if trainer.best else None,
        config_digest=config.training_digest(task),
        model_digest=run.model_digest,
        steps=trainer.state.global_step,
        train_loss=mean_loss,
        seconds=round(trainer.seconds, 3),
        padding=padding,
        switched_off=switched_off(
            Path(config.model.path), trainer.stack.base, config.lora.projector_learning_rate is not None
        ),
        template_date=fixed_date(Path(config.model.path)),
        bank_layer=trainer.stack.layer,
        kernels=used_kernels(trainer.stack.base),
        recomputed_layers=trainer.recomputation.count,
        frozen_bank_bytes=trainer.objective.frozen_bytes,
        weights=trainer.objective.weights,
    )
    record_answering(config, ledger)
    if trainer.best is not None:
        log.info("%s: the bank is that of step %s, the best validation", task.name, trainer.best.step)
    log.info(
        "%s: %s steps in %.0f s, mean loss %.4f; bank: %s",
        task.name,
        f"{trainer.state.global_step:,}",
        trainer.seconds,
        mean_loss,
        folder,
    )
    shutil.rmtree(work_folder(config.run_dir, task.name), ignore_errors=True)
