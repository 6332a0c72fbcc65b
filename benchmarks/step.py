"""A training step with 1, 8 and 32 banks, against PEFT with 8 banks active.

    python -m benchmarks.step                      # the shape that the published code was measured at
    python -m benchmarks.step --size 7b --checkpointing --repetitions 5

A step is the trainer's own: forward and backward of one batch, both penalties, AdamW. The baseline is PEFT with all
banks active and the last one trained, as its users write it: `model(**batch).loss`, no penalties. Beside it stand the
same with logits at labelled positions alone, as ours; the same with the penalties' formulas under autograd; and the
floor, forward and backward through the base model without any bank.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from benchmarks.baselines import adapter_matrices, alternating, autograd_penalties, peft_all_active
from benchmarks.harness import Setting, finish, language_model, parse, random_banks, random_batch
from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import RegularizationConfig
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.methods.mslora_cr import WeightedPenalties
from mslora_cr.training.trainer import BankTrainer, loss_mask

ALPHA, BETA = 0.1, 0.01
LEARNING_RATE = 2e-4
BANKS, MANY = 8, 32


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("step", __doc__, argv, _add_arguments)
    banks = random_banks(setting.size, MANY)
    batch = random_batch(setting.size, setting.args.labelled, setting.device)
    penalties: dict[str, list[float]] = {f"penalties, {count} banks": [] for count in (BANKS, MANY)}
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "1 bank": _ours(setting, folder, banks[:1], batch, None),
            f"{BANKS} banks": _ours(setting, folder, banks[:BANKS], batch, penalties[f"penalties, {BANKS} banks"]),
            f"{BANKS} banks, no penalties": _ours(setting, folder, banks[:BANKS], batch, None),
            f"{MANY} banks": _ours(setting, folder, banks, batch, penalties[f"penalties, {MANY} banks"]),
            "PEFT, all active": _peft(setting, banks[:BANKS], batch),
            "PEFT, labelled logits": _peft(setting, banks[:BANKS], batch, labelled=True),
            "PEFT, autograd penalties": _peft(setting, banks[:BANKS], batch, penalties=True),
            "floor": _floor(setting, batch),
        }
        seconds = setting.interleaved(variants, warm_up=2)
    seconds |= {name: values[-setting.repetitions :] for name, values in penalties.items()}
    tokens = setting.size.batch * setting.size.length
    return finish(
        setting,
        seconds,
        {
            "banks_8_over_1": ("8 banks", "1 bank"),
            "banks_32_over_8": ("32 banks", "8 banks"),
            "penalties_share": ("penalties, 8 banks", "8 banks"),
            "peft_all_active_over_ours": ("PEFT, all active", "8 banks"),
            "peft_labelled_logits_over_ours": ("PEFT, labelled logits", "8 banks"),
            "peft_autograd_penalties_over_ours": ("PEFT, autograd penalties", "8 banks"),
            "floor_over_ours": ("floor", "8 banks"),
        },
        extra={"tokens_per_step": tokens, "labelled_per_sample": setting.args.labelled},
    )


def _add_arguments(parser: Any) -> None:
    parser.add_argument("--labelled", type=int, default=8, metavar="N", help="labelled positions per sample")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")


def _ours(
    setting: Setting, folder: str, banks: Sequence[Bank], batch: dict[str, Tensor], taken: list[float] | None
) -> Callable[[], None]:
    """A step of the trainer with the last bank live; with `taken`, with penalties, whose seconds go there."""
    stack = BankStack(language_model(setting.size, setting.device), "merge")
    stack.set_frozen(banks[:-1])
    stack.add_trainable(setting.size.rank, setting.size.rank, initial=banks[-1])
    bfloat16 = setting.size.dtype == "bfloat16"
    trainer = BankTrainer(
        stack=stack,
        samples=[],  # type: ignore[arg-type]  (the batch is given directly)
        collator=TrainingCollator(0),
        args=TrainingArguments(
            output_dir=folder,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            optim="adamw_torch",
            bf16=bfloat16,
            use_cpu=setting.device.type == "cpu",
            report_to="none",
        ),
        bank_shape=(setting.size.rank, setting.size.rank),
        penalty=_penalties(setting, banks[:-1]) if taken is not None else None,
    )
    if setting.args.checkpointing:
        stack.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    if taken is not None:
        prepare = trainer._prepare_penalty

        def measured() -> Tensor:
            value: list[Tensor] = []
            taken.append(setting.seconds(lambda: value.append(prepare())))
            return value[0]

        trainer._prepare_penalty = measured  # type: ignore[method-assign]

    labelled = (batch["labels"] != -100).sum()
    records = torch.arange(setting.size.batch)

    def step() -> None:
        trainer.training_step(model, {**batch, "record_index": records}, labelled)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _penalties(setting: Setting, frozen: Sequence[Bank]) -> WeightedPenalties:
    terms = BankPenalties(frozen, alternating(len(frozen)), setting.device)
    return WeightedPenalties(terms, RegularizationConfig(alpha=ALPHA, beta=BETA))


def _peft(
    setting: Setting, banks: Sequence[Bank], batch: dict[str, Tensor], labelled: bool = False, penalties: bool = False
) -> Callable[[], None]:
    model = peft_all_active(language_model(setting.size, setting.device), banks, train_last=True)
    if setting.args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    current = adapter_matrices(model, banks[-1].name)
    frozen = [adapter_matrices(model, bank.name) for bank in banks[:-1]]
    optimizer = torch.optim.AdamW([part for pair in current.values() for part in pair], LEARNING_RATE, weight_decay=0)
    inputs = _labelled_alone(batch) if labelled else {**batch, "use_cache": False}

    def step() -> None:
        with _autocast(setting):
            loss = model(**inputs).loss
        if penalties:
            loss = loss + autograd_penalties(current, frozen, alternating(len(frozen)), ALPHA, BETA)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _floor(setting: Setting, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, and backward down to the word vectors, of the base model alone."""
    model = language_model(setting.size, setting.device)
    if setting.args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    inputs = _labelled_alone(batch)
    vectors = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()

    def step() -> None:
        with _autocast(setting):
            loss = model(**inputs, inputs_embeds=vectors).loss
        loss.backward()
        vectors.grad = None

    return step


def _labelled_alone(batch: dict[str, Tensor]) -> dict[str, Any]:
    keep, targets = loss_mask(batch["labels"])
    return {**batch, "labels": targets, "shift_labels": targets, "logits_to_keep": keep, "use_cache": False}


def _autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.size.dtype == "bfloat16")


if __name__ == "__main__":
    main()
