"""The Trainer of one bank: cross entropy on labelled positions, plus the terms of the method."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.io import save_bank
from mslora_cr.banks.stack import TRAINABLE, BankStack
from mslora_cr.data.datasets import ConcatTrainDataset
from mslora_cr.data.input_processor import Collate
from mslora_cr.distributed.comm import barrier, broadcast_object
from mslora_cr.distributed.deepspeed import float32_value, gather_params, reshard
from mslora_cr.models.language import decoder_layers, last_mlp
from mslora_cr.models.sparse_mlp import SparseMLP
from mslora_cr.training.arguments import set_rate
from mslora_cr.training.callbacks import TowerOutsideGraph
from mslora_cr.training.checkpoints import (
    BANK_FOLDER,
    EXTRA_STATE,
    LAUNCH,
    STAGING,
    STATE,
    BestBank,
    Launch,
    Publisher,
    reading,
    stored_numbers,
    writing,
)
from mslora_cr.training.inputs import loss_mask
from mslora_cr.training.objective import Objective, check_finite
from mslora_cr.training.out_of_memory import least_layers, noting_more_layers
from mslora_cr.training.passes import Passes
from mslora_cr.training.recomputation import Recomputation, Setting
from mslora_cr.training.sampler import FixedOrderSampler, SampleOrder
from mslora_cr.training.trackers import reads_checkpoints
from mslora_cr.training.validation import Validation, ValidationSet

log = logging.getLogger(__name__)


class BankTrainer(Trainer):
    """Trains the trainable bank of a `BankStack`."""

    def __init__(
        self,
        stack: BankStack,
        samples: ConcatTrainDataset,
        collator: Collate,
        args: TrainingArguments,
        bank_shape: tuple[int, float],
        input_digests: Mapping[str, str] | None = None,
        order: Sequence[int] | None = None,
        objective: Objective | None = None,
        callbacks: list[TrainerCallback] | None = None,
        checkpointing: Setting = False,
        validation: ValidationSet | None = None,
        keep_best: bool = False,
    ) -> None:
        """
        Args:
            stack: The model, with the trainable bank on top.
            bank_shape: Rank and alpha of the trainable bank.
            input_digests: Digests of what decides the bank, noted in its checkpoints.
            order: Positions of the samples, with repetitions, in the order of visits; otherwise each epoch shuffles
                them all.
            objective: The terms beside the cross entropy; none by default.
            checkpointing: Which decoder layers' activations are recomputed; `args.gradient_checkpointing` must be true
                if there are any.
            validation: What is measured when `args.eval_strategy` asks for it.
            keep_best: Whether `stored_bank` is that of the best validation, by `args.metric_for_best_model`.
        """
        least = least_layers(Path(args.output_dir), args.per_device_train_batch_size)
        self.recomputation = Recomputation(decoder_layers(stack.base), checkpointing, least)
        super().__init__(
            model=stack.model,
            args=args,
            train_dataset=samples,
            eval_dataset=validation.samples if validation else None,
            data_collator=collator,
            callbacks=[TowerOutsideGraph(), self.recomputation, *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = True  # Some models deny it, though their loss divides by the given number.
        self.stack = stack
        self.samples = samples
        self.order = SampleOrder(samples, args, order)
        self.bank_shape = bank_shape
        self.input_digests = dict(input_digests or {})
        self.objective = objective or Objective()
        self.objective.attach(stack)
        self._staging = broadcast_object(f"{STAGING}-{secrets.token_hex(8)}")
        self._publisher = Publisher(Path(args.output_dir), args.save_total_limit or 1)
        self._sparse_mlp = SparseMLP(last_mlp(stack.base))
        self._micro_batch: dict[str, Tensor] = {}
        self._logged: dict[str, Tensor] = {}
        self._logged_from = 0
        self._loss_sum = torch.zeros((), device=args.device)
        # Positions with a token, and all positions.
        self._positions = torch.zeros(2, dtype=torch.int64, device=args.device)
        self._started = time.monotonic()
        self._parameters = stack.trainable_parameters()
        self.passes = self._passes(samples)
        self._validation = Validation(validation, stack, self._passes(validation.samples)) if validation else None
        self._keep_best = keep_best
        self.best: BestBank | None = None

    def _passes(self, samples: ConcatTrainDataset) -> Passes:
        return Passes(
            self.stack,
            samples,
            self.data_collator,
            self.args.seed,
            to_device=self._prepare_inputs,
            autocast=self.compute_loss_context_manager,
            sparse_mlp=self._sparse_mlp,
            release=lambda: reshard(self),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the projector groups of its own: the Trainer has one learning rate."""
        optimizer = super().create_optimizer(model)
        if self.stack.projector.learning_rate is not None:
            set_rate(optimizer, self.stack.projector.parameters.values(), self.stack.projector.learning_rate)
        return optimizer

    # --- one step ---

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train, unless the last step is done or training stopped early: from a checkpoint of that step, the Trainer
        would take one more step.

        No public hook can prevent that: what a callback decides is read only after a step or an epoch.
        """
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the cross entropy of labelled positions, the only ones that go through `lm_head`, and the method's
        distillation.

        Raises:
            NonFiniteLossError: Before anything has changed.
        """
        records = inputs.pop("record_index")
        keep, targets = loss_mask(inputs["labels"])
        if num_items_in_batch is not None:
            # A batch whose every record is masked entirely has nothing to divide by; its loss is zero.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        inputs = {**inputs, "logits_to_keep": keep, "use_cache": False}
        # The teacher comes before the student: under ZeRO-3 nothing may come between a forward pass and its backward
        # pass.
        teacher = self._logits_without_bank(model, inputs) if self.objective.distillation else None
        loss, outputs = super().compute_loss(
            model,
            {**inputs, "labels": targets, "shift_labels": targets},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        self._micro_batch = {"ce": loss.detach()}
        if (distillation := self.objective.distillation) is not None:
            assert teacher is not None and num_items_in_batch is not None, "distillation is for training only"
            # The distillation is averaged over tokens as the cross entropy is: over all ranks and micro-batches of an
            # update.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            distilled = distillation.term(outputs.logits, teacher).sum() * ranks / num_items_in_batch
            self._micro_batch["distillation"] = distilled.detach()
            loss = loss + distillation.weight * distilled
        check_finite(
            loss, f"{self.args.run_name}: the loss at step {self.state.global_step + 1}", self.samples, records
        )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _logits_without_bank(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self.stack.trainable_off():
            return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run a micro-batch; the last one of an update adds the penalty's gradient."""
        if self.recomputation.undecided:
            self._decide_recomputation()
        mask = inputs["attention_mask"]
        self._positions[0] += mask.sum()
        self._positions[1] += mask.numel()
        step = super().training_step

        def micro_batch() -> Tensor:
            return step(model, dict(inputs), num_items_in_batch)

        alone = self.args.world_size == 1 and not self.is_deepspeed_enabled
        with self._penalized() as (penalty, terms), self._sparse_mlp.masked(loss_mask(inputs["labels"])[0]):
            loss = self.recomputation.retrying(self._parameters, micro_batch) if alone else micro_batch()
        for name, value in [*terms.items(), *self._micro_batch.items()]:
            self._log_term(name, value)
        total = loss if penalty is None else loss + penalty.to(loss.dtype)
        self._loss_sum += total.detach()
        return total

    def _penalized(self) -> AbstractContextManager[tuple[Tensor | None, Mapping[str, Tensor]]]:
        """Return the penalty and its terms in the last micro-batch of an update; nothing in the others."""
        if not self.accelerator.sync_gradients:
            return nullcontext((None, {}))
        where = f"{self.args.run_name}: the penalty at step {self.state.global_step + 1}"
        return self.objective.penalized(self._get_learning_rate(), where)

    def _decide_recomputation(self) -> None:
        """Decide once, before the first step, from a pass over the longest samples; the same on every rank."""

        def longest() -> AbstractContextManager[Tensor]:
            by_length = sorted(range(len(self.samples)), key=self.order.lengths.__getitem__)
            self.model.train()
            return self.passes.summed_loss(by_length[-self.args.train_batch_size :])

        trained = sum(parameter.numel() for parameter in self._parameters)
        run, device, apart = str(self.args.run_name), self.args.device, not self.is_deepspeed_enabled
        self.recomputation.decide(run, device, longest, self.passes.gradients, trained, apart)

    # --- validation ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the validation set, log the figures, and tell callbacks; the Trainer's own would average the loss by
        batch, which depends on the number of processes, and generates nothing."""
        assert self._validation is not None, "the Trainer asks for it only where there is an eval_dataset"
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._validation.measure().items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Copy the bank where it is the best so far: `on_evaluate` comes before the Trainer has compared.

        A checkpoint holds the copy. With `best_global_step` the Trainer would look for a checkpoint of that step.
        """
        better = super()._determine_best_metric(metrics, trial)
        self.state.best_global_step = None
        if better and self._keep_best:
            bank = self.stack.snapshot(TRAINABLE, *self.bank_shape, gather_fn=float32_value)
            self.best = BestBank(self.state.global_step, metrics, bank, self.stack.extra_state(float32_value))
        return better

    def stored_bank(self, name: str, metadata: dict[str, Any]) -> Bank:
        """Return the bank to store: the best one where it is kept, else the latest. To be called on every rank."""
        if self.best is not None:
            return self.stack.stored(replace(self.best.bank, name=name, metadata=metadata), self.best.extra_state)
        bank = self.stack.snapshot(name, *self.bank_shape, metadata, float32_value)
        return self.stack.stored(bank, self.stack.extra_state(float32_value))

    # --- the order of samples ---

    def _get_train_sampler(self, train_dataset: Any = None) -> FixedOrderSampler:
        """The Trainer takes no sampler as an argument; overriding `get_train_dataloader` instead would repeat what it
        does for workers, seeds and accelerate."""
        multiple = self.args.train_batch_size * self.args.world_size
        return FixedOrderSampler(self._epoch_order, len(self.order), len(self.samples), multiple)

    def _epoch_order(self) -> Sequence[int]:
        """The epoch is looked up here because accelerate and the Trainer tell it to a sampler only where they find it:
        in an epoch that a checkpoint cut in two, several processes have it wrapped too deeply."""
        return self.order.of_epoch(int(self.state.epoch or 0))

    def padding(self) -> dict[str, float]:
        """Return the share of padded positions so far; where samples are grouped, that of random order too."""
        real, everything = self.accelerator.reduce(self._positions, "sum").tolist()
        shares = {"share": 1 - real / max(everything, 1)}
        return shares | ({"in_random_order": self.order.padding_if_shuffled()} if self.order.grouped else {})

    # --- logging ---

    @property
    def seconds(self) -> float:
        """Time spent on this task, in earlier launches up to the checkpoint too."""
        return time.monotonic() - self._started

    def mean_loss(self) -> float:
        """Return the loss per update, averaged over all steps, those of earlier launches too, and over ranks."""
        return self.accelerator.reduce(self._loss_sum, "mean").item() / max(self.state.global_step, 1)

    def _log_term(self, name: str, value: Tensor) -> None:
        self._logged[name] = self._logged.get(name, torch.zeros((), device=value.device)) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term, averaged over the steps since the last log and over ranks."""
        steps = self.state.global_step - self._logged_from
        if "loss" in logs and self._logged and steps:
            for name, total in self._logged.items():
                logs[name] = self.accelerator.reduce(total.to(self.args.device), "mean").item() / steps
            self._logged, self._logged_from = {}, self.state.global_step
        super().log(logs, start_time)

    # --- saving: the trainable bank and nothing else, whole or not at all ---

    def _get_output_dir(self, trial: Any) -> str:
        """Return where the Trainer writes a checkpoint and its state: no argument separates it from the run's."""
        return str(Path(self.args.output_dir) / self._staging)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; when it returns, the last checkpoint is whole, and the model has the bank to store."""
        with noting_more_layers(self, self.recomputation), self._publisher:
            output = super().train(*args, **kwargs)
        if self.best is not None:
            with gather_params(self._parameters, to_write=True):
                self.stack.load_trainable(self.best.bank, self.best.extra_state)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write a checkpoint under a temporary name, and publish it while training goes on.

        No public hook is called before it writes: `on_save` comes when a half-written one would already count.
        """
        self._publisher.wait()
        staging = Path(self._get_output_dir(trial))
        if self.args.should_save:
            for left in staging.parent.glob(f"{STAGING}*"):  # by this trainer before, or by a killed one
                shutil.rmtree(left, ignore_errors=True)
        barrier()
        with writing(staging):
            super()._save_checkpoint(model, trial)
        barrier()  # every rank's part is written
        if self.args.should_save:
            written = staging / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._publisher.publish(written, at_once=reads_checkpoints(self.callback_handler.callbacks))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable bank, and what this trainer adds to the Trainer's state, into a checkpoint."""
        assert output_dir is not None
        loss_sum = self.accelerator.reduce(self._loss_sum, "mean")
        positions = self.accelerator.reduce(self._positions, "sum")
        bank = self.stack.snapshot(TRAINABLE, *self.bank_shape, gather_fn=float32_value)
        beside = {EXTRA_STATE: self.stack.extra_state(float32_value)}
        if self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_bank(bank, folder / BANK_FOLDER, beside=beside)
            state = {
                "penalty": self.objective.state_dict(),
                "loss_sum": loss_sum,
                "positions": positions,
                "seconds": self.seconds,
            } | ({"best": self.best.write(folder)} if self.best else {})
            torch.save(state, folder / STATE)
            Launch.of(self.args, self.input_digests).write(folder / LAUNCH)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """`save_model` has no public counterpart that reads what it wrote."""
        with reading(resume_from_checkpoint):
            self.stack.load_trainable(*stored_numbers(Path(resume_from_checkpoint) / BANK_FOLDER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """So that a damaged file is named: no public hook is around the Trainer's reading."""
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """And what `save_model` added to them: there is no `on_load` as there is `on_save`."""
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            self._load_own_state(checkpoint)

    def _load_own_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / STATE, map_location="cpu", weights_only=True)
            self.best = BestBank.read(Path(checkpoint), state["best"]) if "best" in state else None
            self.objective.load_state_dict(state["penalty"])
            self._loss_sum = state["loss_sum"].to(self._loss_sum.device)
            if self.args.process_index == 0:  # they are summed over ranks
                self._positions = state["positions"].to(self._positions.device)
            self._started -= state["seconds"]
            self._logged_from = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
