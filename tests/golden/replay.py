"""Replay what the published code computed: `python -m tests.golden.replay DIR [--device cuda]`.

DIR is in the format of `tests/golden/tiny_a` (see the README beside this file). Everything goes through the project's
own loader, collator, banks, losses, Trainer and decoding. Prints check, worst deviation, tolerance and verdict, and
exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.io import load_bank
from mslora_cr.banks.published import published_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import RegularizationConfig
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.data.datasets import ConcatTrainDataset, EvalDataset, TrainDataset
from mslora_cr.data.images import load_image, preprocess
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.prompts import encode_conversation, encode_prompt, generation_prompt
from mslora_cr.data.records import TestRecords, TrainingRecords
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.prefix_decoder import Decoder, Stopping
from mslora_cr.generation.run import scored_batches
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.methods.mslora_cr import WeightedPenalties
from mslora_cr.models import llava_med
from mslora_cr.models.layout import linear_name
from mslora_cr.training.objective import Objective
from mslora_cr.training.trainer import BankTrainer, loss_mask

PIXELS, BASE_LOSS, LOGITS, PENALTIES = 1e-5, 1e-5, 1e-4, 1e-5
GRADIENTS, TRAINING_LOSS, FINAL_BANKS, EXACT = 1e-4, 5e-5, 2e-4, 0.0

MERGE_MODES = ("merge", "concatenate")


@dataclass
class Check:
    """The worst deviation seen of one kind."""

    name: str
    tolerance: float
    worst: float = 0.0
    comparisons: int = 0

    def see(self, deviation: float) -> None:
        self.comparisons += 1
        # max() would let a NaN pass.
        if not deviation <= self.worst:
            self.worst = deviation

    @property
    def passed(self) -> bool:
        return self.comparisons > 0 and self.worst <= self.tolerance


def absolute(ours: Any, theirs: Any) -> float:
    ours, theirs = (torch.as_tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (ours, theirs))
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return (ours - theirs).abs().max().item() if ours.numel() else 0.0


def relative(ours: Any, theirs: Any) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    ours, theirs = (torch.as_tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (ours, theirs))
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def flat(bank: Bank, like: Bank) -> Tensor:
    """All of a bank's numbers in one vector, in the order of another bank's layers."""
    return torch.cat([matrix.flatten() for name in like.matrices for matrix in bank.matrices[name]])


@dataclass
class Replay:
    """All checks of one golden folder, with frozen banks merged one way, computed on one device."""

    folder: Path
    merge_mode: str
    device: str = "cpu"
    checks: dict[str, Check] = field(default_factory=dict)

    def run(self) -> list[Check]:
        self.tokenization()
        self.pixels()
        self.base()
        for task in self.training["tasks"]:
            self.task(task)
        self.generations()
        return list(self.checks.values())

    def see(self, name: str, tolerance: float, deviation: float) -> None:
        self.checks.setdefault(name, Check(name, tolerance)).see(deviation)

    # --- what stands in the folder ---

    @cached_property
    def training(self) -> dict[str, Any]:
        return json.loads((self.folder / "training.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    @cached_property
    def records(self) -> TrainingRecords:
        return TrainingRecords(self.folder / "conversations.json")

    @cached_property
    def positions(self) -> dict[Any, int]:
        return {record.id: index for index, record in enumerate(self.records)}

    @cached_property
    def banks(self) -> list[Bank]:
        return [load_bank(self.folder / "checkpoints" / task["dir"]) for task in self.training["tasks"]]

    def initial(self, number: int) -> Bank:
        place = self.folder / "checkpoints" / f"task{number}_init.safetensors"
        rank, alpha = self.training["rank"], self.training["lora_alpha"]
        return published_bank(place, f"task{number}", rank, alpha, load_file(place))

    def load(self) -> llava_med.LlavaMed:
        configs = self.folder.glob("*/config.json")
        [path] = [c.parent for c in configs if json.loads(c.read_text())["model_type"] == "llava_mistral"]
        return llava_med.load(path, dtype=torch.float32, attn_implementation="eager", device=self.device)

    @cached_property
    def input_processor(self) -> LlavaMedInputs:
        base = self.load()
        return LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)

    @cached_property
    def samples(self) -> TrainDataset:
        return TrainDataset(self.records, [self.folder], self.input_processor)

    @cached_property
    def batches(self) -> list[list[int]]:
        return [[self.positions[name] for name in batch] for batch in self.training["batches"]]

    # --- the checks ---

    def tokenization(self) -> None:
        expected = json.loads((self.folder / "tokenization.json").read_text(encoding="utf-8"))
        tokenizer = self.input_processor.tokenizer
        for item in expected["supervised"]:
            record = self.records[self.positions[item["id"]]]
            encoded = encode_conversation(tokenizer, record.turns, len(record.images))
            self.see("training ids", EXACT, float(encoded.input_ids != item["input_ids"]))
            self.see("labels", EXACT, float(encoded.labels != item["labels"]))
        for item in expected["prompts"]:
            prompt = generation_prompt(self.records[self.positions[item["id"]]].turns[0].text)
            self.see("prompts", EXACT, float(prompt != item["prompt"]))
            self.see("prompt ids", EXACT, float(encode_prompt(tokenizer, prompt) != item["input_ids"]))

    def pixels(self) -> None:
        files = {file.name: file for file in (self.folder / "images").iterdir()}
        for key, expected in load_file(self.folder / "pixel_values.safetensors").items():
            ours = preprocess(load_image(files[Path(key).name]), self.input_processor.image_processor)
            self.see("pixels", PIXELS, absolute(ours, expected.view_as(ours)))

    def base(self) -> None:
        model = self.load().model
        for batch, expected in zip(self.batches, self.training["base.loss"], strict=True):
            loss, _ = self.forward(model, batch)
            self.see("base loss", BASE_LOSS, absolute(loss, expected))
        self.compare_logits(model, "base.logits_every_256th", self.training["base.target_logprobs"])

    @torch.no_grad()
    def forward(self, model: Any, batch: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Loss, and each sample's logits at its labelled positions."""
        inputs = TrainingCollator(self.input_processor.tokenizer.pad_token_id)([self.samples[i] for i in batch])
        del inputs["record_index"]
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        keep, targets = loss_mask(inputs["labels"])
        inputs["labels"] = targets
        output = model(**inputs, shift_labels=targets, logits_to_keep=keep)
        return output.loss, list(output.logits.split(keep.sum(1).tolist()))

    def compare_logits(self, model: Any, key: str, logprobs: list[list[float]]) -> None:
        _, logits = self.forward(model, self.batches[0])
        self.see("logits", LOGITS, absolute(torch.cat(logits)[:, ::256], self.tensors[key]))
        for sample, ours, expected in zip(self.batches[0], logits, logprobs, strict=True):
            labels = torch.tensor([label for label in self.samples[sample]["labels"] if label >= 0])
            picked = ours.cpu().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            self.see("target log-probabilities", LOGITS, absolute(picked, expected))

    def task(self, expected: dict[str, Any]) -> None:
        """Train one bank as the stream does, on top of the golden banks before it."""
        number = expected["task"]
        frozen = self.banks[: number - 1]
        same = [bool(flag) for flag in self.training["is_same_modality"].get(str(number), [])]
        stack = BankStack(self.load().model, self.merge_mode)
        stack.set_frozen(frozen)
        stack.add_trainable(self.training["rank"], self.training["lora_alpha"], initial=self.initial(number))
        penalties = BankPenalties(frozen, same, torch.device(self.device)) if frozen else None
        steps = self.train(stack, penalties, number)
        self.compare_steps(expected, steps)
        self.compare_ends(expected, stack, penalties)

    def train(self, stack: BankStack, penalties: BankPenalties | None, number: int) -> list[dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder,
                learning_rate=self.training["lr"],
                num_train_epochs=1,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                weight_decay=0.0,
                max_grad_norm=0.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=self.device == "cpu",
                disable_tqdm=True,
                remove_unused_columns=False,
                label_names=["labels"],
            )
            weights = RegularizationConfig(alpha=self.training["alpha"], beta=self.training["beta"])
            trainer = BankTrainer(
                stack=stack,
                samples=ConcatTrainDataset([self.samples]),
                collator=TrainingCollator(self.input_processor.tokenizer.pad_token_id),
                args=args,
                bank_shape=(self.training["rank"], self.training["lora_alpha"]),
                objective=Objective(WeightedPenalties(penalties, weights) if penalties else None),
                callbacks=[CompareGradients(self, stack, number)],
            )
            batches: Any = DataLoader(self.samples, batch_sampler=self.batches, collate_fn=trainer.data_collator)
            trainer.get_train_dataloader = lambda: batches  # type: ignore[method-assign]
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    def compare_steps(self, expected: dict[str, Any], steps: list[dict[str, float]]) -> None:
        assert len(steps) == len(expected["train_loss"])
        for row, loss, norm in zip(steps, expected["train_loss"], expected["grad_norm"], strict=True):
            self.see("training loss", TRAINING_LOSS, absolute(row["loss"], loss))
            self.see("gradient norm", GRADIENTS, relative(row["grad_norm"], norm))
        for row, parts in zip(steps, expected["printed"], strict=False):
            self.see("cross entropy", TRAINING_LOSS, absolute(row["ce"], parts["ce_loss"]))
            self.see("contrastive term", PENALTIES, relative(row["contrastive"], parts["reg_loss"]))
            self.see("orthogonality term", PENALTIES, relative(row["orthogonality"], parts["ortho_loss"]))

    def compare_ends(self, expected: dict[str, Any], stack: BankStack, penalties: BankPenalties | None) -> None:
        number = expected["task"]
        ours = stack.snapshot("ours", self.training["rank"], self.training["lora_alpha"])
        theirs = self.banks[number - 1]
        self.see("final banks", FINAL_BANKS, relative(flat(ours, theirs), flat(theirs, theirs)))
        for index, similarity in enumerate(expected["end_sim_to_previous"]):
            # With a single frozen bank of another modality the term is the similarity itself.
            one = BankPenalties([self.banks[index]], [False], torch.device("cpu"))
            self.see("similarity", PENALTIES, relative(one.terms(theirs.matrices, 0.0, 0.0)[0], similarity))
        if penalties is not None:
            matrices = {name: (a.to(self.device), b.to(self.device)) for name, (a, b) in theirs.matrices.items()}
            orthogonality = penalties.terms(matrices, 0.0, 0.0)[1]
            self.see("orthogonality at the end", PENALTIES, relative(orthogonality, expected["end_ortho"]))
        merged = BankStack(self.load().model, self.merge_mode, reuse=True)
        for count, logprobs in expected["target_logprobs_with_first_k_banks"].items():
            merged.set_frozen(self.banks[: int(count)])
            self.compare_logits(merged.model, f"task{number}.banks{count}.logits_every_256th", logprobs)

    def generations(self) -> None:
        expected = json.loads((self.folder / "generations.json").read_text(encoding="utf-8"))
        limit = max(len(item["output_ids"]) for item in expected) - 1
        merged = BankStack(self.load().model, self.merge_mode, reuse=True)
        with tempfile.TemporaryDirectory() as folder:
            questions = self.questions(Path(folder))
            by_id = {record.question_id: index for index, record in enumerate(questions.records)}
            for count in sorted({item["banks"] for item in expected}):
                merged.set_frozen(self.banks[:count])
                wanted = [item for item in expected if item["banks"] == count]
                for item, ids in zip(
                    wanted,
                    self.decode(merged.model, questions, [by_id[item["id"]] for item in wanted], limit),
                    strict=True,
                ):
                    text = self.input_processor.tokenizer.decode([ids])[0]
                    self.see("generated ids", EXACT, float(ids != item["output_ids"][1:]))
                    self.see("generated text", EXACT, float(text != item["text"]))

    def questions(self, folder: Path) -> EvalDataset:
        """The records with an image as a test file."""
        lines = [
            {"question_id": record.id, "image": list(record.images), "text": record.turns[0].text}
            | {"gt": "", "answer_type": "OPEN"}
            for record in self.records
            if record.images
        ]
        path = folder / "test.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return EvalDataset(TestRecords(path), [self.folder], self.input_processor)

    def decode(self, model: Any, questions: EvalDataset, indices: Sequence[int], limit: int) -> Iterator[list[int]]:
        prompts = questions.prompts()
        waves = in_waves(grouped(prompts, indices, lambda _: None), prompts, Limits(8, limit, 8192))
        decoder = Decoder(model, prompts, Stopping.of(self.input_processor.tokenizer, limit))
        answers: dict[int, list[int]] = {}
        for batch in scored_batches(decoder, questions, waves):
            answers.update(zip(batch.questions, batch.ids, strict=True))
        return (answers[index] for index in indices)


class CompareGradients(TrainerCallback):
    """Compares the trainable bank's gradients, penalties included, in the steps that the golden tensors hold."""

    def __init__(self, replay: Replay, stack: BankStack, number: int) -> None:
        self.replay, self.stack, self.number = replay, stack, number

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        prefix = f"task{self.number}.step{state.global_step}.grad."
        trainable = self.stack.trainable()
        for key, expected in self.replay.tensors.items():
            if key.startswith(prefix):
                published, _, half = key.removeprefix(prefix).partition(".cl_lora_pool.")
                name = linear_name(published)
                assert name is not None
                gradient = trainable[name]["AB".index(half[-1])].grad
                assert gradient is not None
                # B starts at zero, so A's first gradient without penalties is zero: nothing to be relative to.
                small = expected.norm() < 1e-12
                deviation = absolute(gradient, expected) if small else relative(gradient, expected)
                self.replay.see("gradients", GRADIENTS, deviation)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.replay", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder in the format of tests/golden/tiny_a")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument(
        "--merge-mode",
        choices=MERGE_MODES,
        nargs="+",
        default=MERGE_MODES,
        help="how frozen banks join (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    failed = 0
    for merge_mode in args.merge_mode:
        print(f"\nfrozen banks: {merge_mode}, on {args.device}")
        print(f"{'check':<28}{'compared':>9}{'worst deviation':>17}{'tolerance':>11}  verdict")
        for check in Replay(args.folder, merge_mode, args.device).run():
            verdict = "ok" if check.passed else "FAILED"
            print(f"{check.name:<28}{check.comparisons:>9}{check.worst:>17.2e}{check.tolerance:>11.0e}  {verdict}")
            failed += not check.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
