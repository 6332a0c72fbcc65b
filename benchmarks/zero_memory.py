"""Memory per GPU by ZeRO stage: computed from parameter counts, and measured on a small model.

    python -m benchmarks.zero_memory                       # LLaVA-Med v1.5 on 1, 2, 4 and 8 GPUs, eighth task, rank 64
    python -m benchmarks.zero_memory --gpus 4 --task 1 --rank 128
    python -m benchmarks.zero_memory --measure             # the formula beside what two processes on the CPU hold

Counted is the most that a GPU holds of weights, gradients, optimizer state and what the penalties need, in bfloat16
training. Not counted are activations, which depend on the batch (measured: `benchmarks.real_size`), the CUDA context,
and ZeRO's communication buckets (0.1 GB each at the sizes in `configs/deepspeed`).

`--measure` trains a small random model with `BankTrainer` under torchrun for each stage and adds up the tensors of the
live engine. ZeRO-3's limits on gathered parameters are scaled down with the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.baselines import alternating
from benchmarks.harness import SIZES, Size, language_model, random_banks, random_batch
from benchmarks.real_size import LLAVA_MED
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import RegularizationConfig
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.distributed.comm import rank
from mslora_cr.distributed.deepspeed import partition, prepare_deepspeed
from mslora_cr.distributed.launch import abort_together, start_process_group
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.methods.mslora_cr import WeightedPenalties
from mslora_cr.models.language import language_linears
from mslora_cr.training.objective import Objective
from mslora_cr.training.trainer import BankTrainer

STAGES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "ZeRO-3, offloaded": 4}
BF16, FP32, ADAM = 2, 4, 8
"""Bytes per number: half precision, float32, and AdamW's two moments in float32."""
ROOT = Path(__file__).parents[1]
MEASURED = {
    "tiny": replace(SIZES["tiny"], dtype="bfloat16"),
    "small": replace(SIZES["small"], dtype="bfloat16", vocabulary=2048),  # its share of the model is as small as at 7B
}
STEPS = 3


# --- computed --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Parameters of a base model and of one bank, and the most that ZeRO-3 may gather at once."""

    base: int
    bank: int
    max_live: int


def shape_of(model: nn.Module, bank_rank: int, max_live: int) -> Shape:
    base = sum(parameter.numel() for parameter in model.parameters())
    linears = language_linears(model).values()
    return Shape(base, sum(bank_rank * (linear.in_features + linear.out_features) for linear in linears), max_live)


def llava_med_shape(bank_rank: int) -> Shape:
    vision = CLIPVisionConfig.from_dict(LlavaConfig().vision_config.to_dict())
    known = {key: value for key, value in LLAVA_MED.items() if key in MistralConfig().to_dict()}
    text = MistralConfig(**{key: value for key, value in known.items() if key not in ("architectures", "model_type")})
    with init_empty_weights():
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    return shape_of(model, bank_rank, deepspeed_config(3)["zero_optimization"]["stage3_max_live_parameters"])


def per_gpu(shape: Shape, stage: int, gpus: int, task: int) -> dict[str, float]:
    """Bytes on each GPU in bfloat16 training, by what they hold.

    ZeRO shards the optimizer's state (1), gradients too (2), and weights (3). ZeRO-1 and 2 hold the trainable bank in
    bfloat16 with a float32 master copy; DDP and ZeRO-3 hold it in float32, ZeRO-3 with a master copy besides.

    Gradients are float32 under DDP, which has them a second time in the buckets that it sends. ZeRO's are bfloat16,
    and each rank's shard of them float32 while the optimizer steps: ZeRO-1 has all of them only before that, ZeRO-3
    keeps its bfloat16 shard besides.

    The penalties keep the banks before the task's own in float32, and in the last backward pass of an update their
    gradient, both whole on each GPU.

    Args:
        task: position in the stream, from 1.
    """
    base, bank = shape.base, shape.bank
    if stage == 0:
        gradients = bank * FP32 * min(gpus, 2)
    else:
        share = bank / gpus
        gradients = {1: max(bank * BF16, share * FP32), 2: share * FP32}.get(stage, share * (BF16 + FP32))
    optimizer = bank * (ADAM if stage == 0 else (ADAM + FP32) / gpus)
    weights = base * BF16 + bank * (BF16 if stage in (1, 2) else FP32)
    gather_params = 0
    if stage >= 3:
        weights /= gpus
        gather_params = BF16 * min(shape.max_live, base + bank) if gpus > 1 or stage == 4 else 0
    if stage == 4:
        weights = optimizer = gradients = 0
    return {
        "weights": weights,
        "gathered at once": gather_params,
        "gradients": gradients,
        "optimizer": optimizer,
        "frozen banks": FP32 * bank * (task - 1),
        "penalty gradient": FP32 * bank * (task > 1),
    }


def deepspeed_config(stage: int) -> dict[str, Any]:
    return json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))


# --- measured --------------------------------------------------------------------------------------------------------


def measure(size_name: str, stage: int, gpus: int, task: int) -> dict[str, float]:
    """Bytes that a rank holds, the largest over ranks, by what they hold; trains in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--size", size_name, "--task", str(task), "--rank-of", str(stage), folder]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        done = subprocess.run(
            [sys.executable, *(launcher if stage or gpus > 1 else []), "-m", "benchmarks.zero_memory", *arguments],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{done.stderr}")
        ranks = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*.json")]
    return {name: max(held[name] for held in ranks) for name in ranks[0]}


def train_and_look(size: Size, stage: int, task: int, folder: Path) -> None:
    """One rank's part of `measure`: train a few steps and write the peaks to `folder/RANK.json`."""
    start_process_group(use_gpu=False)
    if stage:
        prepare_deepspeed(use_gpu=False)
    device = torch.device("cpu")
    banks = random_banks(size, task)
    stack = BankStack(language_model(size, device), "merge")
    config = scaled_config(stage, small_shape(size)) if stage else None
    stack.set_frozen(banks[:-1])
    stack.add_trainable(size.rank, size.rank)
    penalty = None
    if task > 1:
        terms = BankPenalties(banks[:-1], alternating(task - 1), device)
        penalty = WeightedPenalties(terms, RegularizationConfig())
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        bf16=True,
        use_cpu=True,
        weight_decay=0.0,
        optim="adamw_torch",
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        deepspeed=config,
    )
    if stage == 3:
        partition(stack.model, args.hf_deepspeed_config.config, torch.device("cpu"), stack.external_parameters())
    trainer = BankTrainer(
        stack=stack,
        samples=random_samples(size),  # type: ignore[arg-type]  (only their number and items are asked for)
        collator=TrainingCollator(0),
        args=args,
        bank_shape=(size.rank, size.rank),
        objective=Objective(penalty),
    )
    peaks = Peaks(trainer, stage)
    trainer.add_callback(peaks)
    trainer.train()
    (folder / f"{rank()}.json").write_text(json.dumps(peaks.bytes), encoding="utf-8")


def random_samples(size: Size) -> list[dict[str, Any]]:
    batch = random_batch(replace(size, batch=2 * STEPS), size.length // 2, torch.device("cpu"))
    no_image = torch.empty(0, 3, 1, 1)
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return [
        {"index": index, "input_ids": ids, "labels": labels, "pixel_values": no_image}
        for index, (ids, labels) in enumerate(rows)
    ]


def small_shape(size: Size) -> Shape:
    """A measured model's, with ZeRO-3's limit on what is gathered as small beside it as the shipped one beside 7B."""
    full = llava_med_shape(64)
    shape = shape_of(language_model(size, torch.device("meta")), size.rank, 0)
    return replace(shape, max_live=round(full.max_live * (shape.base + shape.bank) / (full.base + full.bank)))


def scaled_config(stage: int, shape: Shape) -> dict[str, Any]:
    """A shipped DeepSpeed file, with ZeRO-3's numbers of parameters scaled down to a small model."""
    config = deepspeed_config(stage)
    settings = config["zero_optimization"]
    if stage == 3:
        scale = shape.max_live / settings["stage3_max_live_parameters"]
        for name in settings:
            if name.startswith("stage3_"):
                settings[name] = round(settings[name] * scale)
    return config


class Peaks(TrainerCallback):
    """The most that a trainer's live engine holds of each kind, in bytes."""

    def __init__(self, trainer: BankTrainer, stage: int) -> None:
        names = ("weights", "gathered at once", "gradients", "optimizer", "frozen banks", "penalty gradient")
        self.bytes = dict.fromkeys(names, 0)
        self.bytes["frozen banks"] = trainer.objective.frozen_bytes
        self._trainer, self._stage = trainer, stage
        self._parameters = list(trainer.model.parameters())

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._optimizer = self._trainer.optimizer
        while not isinstance(self._optimizer, torch.optim.AdamW):
            self._optimizer = self._optimizer.optimizer
        self._optimizer.register_step_pre_hook(lambda *_: self._look())
        for parameter in self._trainer.stack.trainable_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: self._look_at_gradients())
        if self._stage == 3:
            from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

            fetch = PartitionedParameterCoordinator.fetch_sub_module

            def fetch_and_look(*args: Any, **kwargs: Any) -> None:
                fetch(*args, **kwargs)
                whole = (parameter.data for parameter in self._parameters)
                self._note("gathered at once", without(storages(whole), self._shards()))

            PartitionedParameterCoordinator.fetch_sub_module = fetch_and_look

    def _look_at_gradients(self) -> None:
        self._note("gradients", self._own_gradients())
        self._note("penalty gradient", storages(self._trainer.objective._pending))

    def _look(self) -> None:
        """When the optimizer is about to step, with all gradients there."""
        engine, stage = self._trainer.model_wrapped, self._stage
        stepped = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        weights = self._shards() if stage == 3 else storages(parameter.data for parameter in self._parameters)
        gradients = self._own_gradients() | storages(parameter.grad for parameter in stepped)
        if stage:
            gradients |= storages(engine.optimizer.averaged_gradients)
        if stage == 3:
            gradients |= storages(engine.optimizer.grad_partitions_flat_buffer)
        optimizer = without(storages(parameter.data for parameter in stepped), weights)
        self._note("weights", weights)
        self._note("gradients", gradients, self._ddp_buckets())
        self._note("optimizer", optimizer | storages(self._optimizer.state))

    def _shards(self) -> dict[int, int]:
        return storages(parameter.ds_tensor for parameter in self._parameters)

    def _own_gradients(self) -> dict[int, int]:
        """Of gradients that the parameters hold themselves, not in a bucket of ZeRO's."""
        gradients = (parameter.grad for parameter in self._parameters if parameter.grad is not None)
        return storages(gradient for gradient in gradients if gradient.untyped_storage().nbytes() == gradient.nbytes)

    def _ddp_buckets(self) -> int:
        if not isinstance(self._trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            return 0
        buckets = self._trainer.model_wrapped._get_ddp_logging_data()["bucket_sizes"]
        return sum(int(size) for size in buckets.split(","))

    def _note(self, name: str, found: dict[int, int], more: int = 0) -> None:
        self.bytes[name] = max(self.bytes[name], sum(found.values()) + more)


def storages(content: Any) -> dict[int, int]:
    """Bytes by address of all tensors inside, so that views of one memory count once."""
    memory = (tensor.untyped_storage() for tensor in tensors(content))
    return {storage.data_ptr(): storage.nbytes() for storage in memory if storage.nbytes()}


def without(ours: dict[int, int], others: dict[int, int]) -> dict[int, int]:
    return {address: size for address, size in ours.items() if address not in others}


def tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor inside nested dictionaries, lists and iterators."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        yield from tensors(list(content.values()))
    elif isinstance(content, Iterable) and not isinstance(content, str):
        for inner in content:
            yield from tensors(inner)


# --- tables ----------------------------------------------------------------------------------------------------------


def computed_table(bank_rank: int, gpus: Sequence[int], task: int) -> None:
    shape = llava_med_shape(bank_rank)
    print_head(shape, task, bank_rank, "GB per GPU", ["stage", "GPUs"])
    for name, stage in STAGES.items():
        for count in gpus:
            print_row([name, str(count)], per_gpu(shape, stage, count, task), 1e9)


def measured_table(
    size_name: str, stages: Sequence[str], processes: Sequence[int], task: int
) -> dict[str, dict[str, dict[str, float]]]:
    size = MEASURED[size_name]
    shape = small_shape(size)
    print_head(shape, task, size.rank, "MB per process", ["stage", "processes", ""])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in stages:
        for count in processes:
            computed = per_gpu(shape, STAGES[name], count, task)
            measured = measure(size_name, STAGES[name], count, task)
            print_row([name, str(count), "computed"], computed, 1e6)
            print_row([name, str(count), "measured"], measured, 1e6)
            found[f"{name}, {count}"] = {"computed": computed, "measured": measured}
    return found


def print_head(shape: Shape, task: int, bank_rank: int, unit: str, columns: Sequence[str]) -> None:
    model = f"base model {shape.base:,} parameters, one bank {shape.bank:,}"
    print(f"{model}; task {task}, rank {bank_rank}, bfloat16; {unit}\n")
    names = [*columns, *per_gpu(shape, 0, 1, task), "sum"]
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")


def print_row(words: Sequence[str], held: dict[str, float], unit: float) -> None:
    figures = [f"{value / unit:.1f}" for value in [*held.values(), sum(held.values())]]
    print(f"| {' | '.join([*words, *figures])} |", flush=True)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Print a table; with `--measure`, also return by stage and processes what was computed and measured, in bytes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zero_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs (1 2 4 8); with --measure, processes (2)")
    parser.add_argument("--rank", type=int, help="rank of a bank (64; with --measure, the model's own)")
    parser.add_argument("--task", type=int, default=8, help="position of the task in the stream, from 1 (8)")
    parser.add_argument("--measure", action="store_true", help="measure on the CPU, beside what is computed")
    parser.add_argument("--size", choices=MEASURED, default="small", help="with --measure, the model (small)")
    parser.add_argument("--stages", choices=list(STAGES)[:4], nargs="+", help="with --measure, only these")
    parser.add_argument("--rank-of", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank_of:
        with abort_together():
            train_and_look(MEASURED[args.size], int(args.rank_of[0]), args.task, Path(args.rank_of[1]))
        return {}
    if args.measure:
        return measured_table(args.size, args.stages or list(STAGES)[:4], args.gpus or [2], args.task)
    computed_table(args.rank or 64, args.gpus or [1, 2, 4, 8], args.task)
    return {}


if __name__ == "__main__":
    main()
