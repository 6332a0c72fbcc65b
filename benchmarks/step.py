"""A training step with 1, 8 and 32 banks, by layer, kernel and recomputation, against PEFT with 8 banks active.

    python -m benchmarks.step                      # the shape that the published code was measured at
    python -m benchmarks.step --size 7b            # a GPU of 80 GB; variants one after another
    python -m benchmarks.step --only "8 banks" floor
    python -m benchmarks.step --family qwen3_vl --size 7b      # a family at its published shape, beside LLaVA-Med

A step is the trainer's own: forward and backward of one batch, both penalties, AdamW. `8 banks` computes as a run does
by default on the device: banks' layers are one operation each, kernels are Liger's where they are installed and there
is a GPU. Beside it stand the same with PEFT's layer, with PyTorch's kernels, and with the other choice of recomputation
(gradient checkpointing): at 7B all layers are recomputed unless a variant says otherwise.

The baseline is PEFT with all banks active and the last one trained, as its users write it: `model(**batch).loss`, no
penalties. Beside it stand the same with logits at labelled positions alone, as ours; the same with the penalties'
formulas under autograd; and the floor, forward and backward through the base model without any bank.

Model-FLOP utilisation is ``4 · N · positions / (seconds · peak)``: two operations per weight and position forward, two
backward to the inputs, none for recomputation, N the weights of the linear layers that banks adapt. With `--family`, a
step with 8 banks of that family is timed beside LLaVA-Med's; `utilisation_over_llava_med` is the ratio of theirs, which
needs no peak. At another size than 7b both have the size's numbers (`family_shapes.py`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from benchmarks.baselines import (
    adapter_matrices,
    alternating,
    autograd_penalties,
    peft_all_active,
    use_pefts_layer,
)
from benchmarks.family_shapes import PUBLISHED, family_batch, family_model
from benchmarks.harness import Setting, finish, language_model, parse, random_banks, random_batch
from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import RegularizationConfig
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.losses.penalty import PenaltyStep
from mslora_cr.methods.mslora_cr import WeightedPenalties
from mslora_cr.models.kernels import use_kernels
from mslora_cr.models.language import language_linears
from mslora_cr.training.objective import Objective
from mslora_cr.training.trainer import BankTrainer, loss_mask
from mslora_cr.utils.kernels import chosen_kernels

ALPHA, BETA = 0.1, 0.01
LEARNING_RATE = 2e-4
BANKS, MANY = 8, 32
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Of bfloat16 products, without sparsity, by a word of the GPU's name."""
RATIOS = {
    "banks_8_over_1": ("8 banks", "1 bank"),
    "banks_32_over_8": ("32 banks", "8 banks"),
    "penalties_share": ("penalties, 8 banks", "8 banks"),
    "peft_layer_over_ours": ("8 banks, PEFT's layer", "8 banks"),
    "torch_kernels_over_ours": ("8 banks, PyTorch's kernels", "8 banks"),
    "other_recomputation_over_ours": ("8 banks, other recomputation", "8 banks"),
    "peft_all_active_over_ours": ("PEFT, all active", "8 banks"),
    "peft_labelled_logits_over_ours": ("PEFT, labelled logits", "8 banks"),
    "peft_autograd_penalties_over_ours": ("PEFT, autograd penalties", "8 banks"),
    "floor_over_ours": ("floor", "8 banks"),
}


class Variant(NamedTuple):
    """How a step of ours is computed."""

    banks: int
    penalties: bool = True
    layer: Literal["fused", "peft"] = "fused"
    kernels: Literal["auto", "torch"] = "auto"
    other_recomputation: bool = False


OURS = {
    "1 bank": Variant(1, penalties=False),
    f"{BANKS} banks": Variant(BANKS),
    f"{BANKS} banks, no penalties": Variant(BANKS, penalties=False),
    f"{MANY} banks": Variant(MANY),
    f"{BANKS} banks, PEFT's layer": Variant(BANKS, layer="peft"),
    f"{BANKS} banks, PyTorch's kernels": Variant(BANKS, kernels="torch"),
    f"{BANKS} banks, other recomputation": Variant(BANKS, other_recomputation=True),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("step", __doc__, argv, _add_arguments)
    if setting.args.checkpointing is None:
        setting.args.checkpointing = setting.args.size == "7b"
    if setting.args.family:
        return beside_llava_med(setting, setting.args.family)
    kernels = chosen_kernels("auto", setting.device.type)
    banks = random_banks(setting.size, MANY)
    batch = random_batch(setting.size, setting.args.labelled, setting.device)
    penalties: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        builders: dict[str, Callable[[], Callable[[], None]]] = {}
        for name, variant in OURS.items():
            if variant.kernels == "torch" and kernels == "torch":
                continue  # as by default here
            taken = penalties.setdefault(f"penalties, {name}", []) if name in ("8 banks", "32 banks") else None
            builders[name] = partial(_ours, setting, folder, banks[: variant.banks], batch, variant, taken)
        builders["PEFT, all active"] = partial(_peft, setting, banks[:BANKS], batch)
        builders["PEFT, labelled logits"] = partial(_peft, setting, banks[:BANKS], batch, labelled=True)
        builders["PEFT, autograd penalties"] = partial(_peft, setting, banks[:BANKS], batch, penalties=True)
        builders["floor"] = partial(_floor, setting, batch)
        chosen = setting.args.only or builders
        seconds, too_large = setting.measured({name: builders[name] for name in chosen}, warm_up=2)
    utilisation = _utilisation(setting, seconds)
    seconds |= {name: values[-setting.repetitions :] for name, values in penalties.items() if values}
    return finish(
        setting,
        seconds,
        RATIOS,
        extra={
            "tokens_per_step": setting.size.batch * setting.size.length,
            "labelled_per_sample": setting.args.labelled,
            "kernels": kernels,
            "recomputed_layers": setting.size.layers if setting.args.checkpointing else 0,
            "out_of_memory": too_large,
            "model_flop_utilisation": utilisation,
        },
    )


def beside_llava_med(setting: Setting, family: str) -> dict[str, Any]:
    """Time a family's step with 8 banks beside LLaVA-Med's."""
    published = setting.args.size == "7b"
    makers = {"LLaVA-Med": partial(language_model, setting.size)}
    makers[family] = partial(family_model, family, setting.size, published)
    batch = random_batch(setting.size, setting.args.labelled, setting.device)
    work, builders = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makers.items():
            empty = make(torch.device("meta"))
            work[name] = sum(linear.weight.numel() for linear in language_linears(empty).values())
            banks = random_banks(setting.size, BANKS, model=empty)
            inputs = family_batch(family, batch) if name == family else batch
            builders[name] = partial(_ours, setting, folder, banks, inputs, Variant(BANKS), None, make)
        seconds, too_large = setting.measured(builders, warm_up=2)
    each = {name: work[name] / median(taken) for name, taken in seconds.items()}
    return finish(
        setting,
        seconds,
        {},
        extra={
            "adapted_weights": work,
            "utilisation_over_llava_med": each[family] / each["LLaVA-Med"] if len(each) == 2 else None,
            "published_shape": published,
            "kernels": chosen_kernels("auto", setting.device.type),
            "out_of_memory": too_large,
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labelled", type=int, default=8, metavar="N", help="labelled positions per sample")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass (default at 7b)",
    )
    parser.add_argument("--family", choices=PUBLISHED, help="time this family's step beside LLaVA-Med's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="time these alone, by their names in the table")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of the device (default: known for some GPUs)")


def _utilisation(setting: Setting, seconds: dict[str, list[float]]) -> dict[str, float] | None:
    """By variant; none where the device's peak is not known."""
    peak = setting.args.peak
    if peak is None and setting.device.type == "cuda":
        name = torch.cuda.get_device_name(setting.device)
        peak = next((value for word, value in PEAK_TFLOPS.items() if word in name), None)
    if peak is None:
        return None
    linears = language_linears(language_model(setting.size, torch.device("meta"))).values()
    weights = sum(linear.weight.numel() for linear in linears)
    work = 4 * weights * setting.size.batch * setting.size.length
    return {name: work / median(taken) / (peak * 1e12) for name, taken in seconds.items()}


def _ours(
    setting: Setting,
    folder: str,
    banks: Sequence[Bank],
    batch: dict[str, Tensor],
    variant: Variant,
    taken: list[float] | None,
    make: Callable[[torch.device], PreTrainedModel] | None = None,
) -> Callable[[], None]:
    """A step of the trainer with the last bank trained; the penalties' seconds go to `taken`, if it is given."""
    base = make(setting.device) if make else language_model(setting.size, setting.device)
    use_kernels(base, chosen_kernels(variant.kernels, setting.device.type))
    stack = BankStack(base, "merge")
    stack.set_frozen(banks[:-1])
    stack.add_trainable(setting.size.rank, setting.size.rank, initial=banks[-1])
    if variant.layer == "peft":
        use_pefts_layer(stack.model)
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
        objective=Objective(_penalties(setting, banks[:-1]) if variant.penalties else None),
    )
    if setting.args.checkpointing != variant.other_recomputation:
        stack.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    if taken is not None:
        penalty = trainer.objective.penalty
        assert penalty is not None
        compute = penalty.step

        def measured(*args: Any) -> PenaltyStep:
            value: list[PenaltyStep] = []
            taken.append(setting.seconds(lambda: value.append(compute(*args))))
            return value[0]

        penalty.step = measured  # type: ignore[method-assign]

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
