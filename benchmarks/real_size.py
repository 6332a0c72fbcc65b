"""The true shapes of LLaVA-Med v1.5 with random weights: loading, a forward pass, a frozen bank, the next one's step.

    python -m benchmarks.real_size make DIR [--size tiny]          # 15.1 GB: four shards, bf16; CLIP beside them
    python -m benchmarks.real_size run DIR [--quantization 4bit] [--json FILE]

`run` states seconds and the process's peak resident memory after each stage, on the CPU or a GPU; on a GPU it also
generates an answer. The step is the trainer's own, with both penalties and gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from sentencepiece import SentencePieceTrainer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    TrainingArguments,
)

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import RegularizationConfig
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.methods.mslora_cr import WeightedPenalties
from mslora_cr.models import llava_med
from mslora_cr.models.language import language_linears
from mslora_cr.models.layout import save_llava_layout
from mslora_cr.runs.environment import environment
from mslora_cr.serving.alone import answer_and_probability
from mslora_cr.training.objective import Objective
from mslora_cr.training.trainer import BankTrainer, loss_mask

TOWER = "clip-vit-large-patch14-336"
BASE = "llava_med_v1.5"
SHARDS = 4
RANK = 64
QUESTION_TOKENS, ANSWER_TOKENS = 56, 8
NEW_TOKENS = 100
LLAVA_MED = {
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": f"../{TOWER}",
    "torch_dtype": "bfloat16",
}


TINY = LLAVA_MED | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "mm_hidden_size": 96,
}
_TINY_TOWER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
_TINY_TOWER |= {"image_size": 56, "patch_size": 14}
SIZES: dict[str, tuple[dict[str, Any], CLIPVisionConfig]] = {
    "7b": (LLAVA_MED, CLIPVisionConfig.from_dict(LlavaConfig().vision_config.to_dict())),
    "tiny": (TINY, CLIPVisionConfig(**_TINY_TOWER)),
}
"""LLaVA-Med's configuration and its tower's; `tiny` is for tests."""


def make(folder: Path, size: str = "7b") -> None:
    """Write the model and its tower. Every tensor is a piece of one random block, so memory stays at one shard."""
    config, vision = SIZES[size]
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    text = MistralConfig(**{name: config[name] for name in (*names, "vocab_size", "rms_norm_eps", "rope_theta")})
    with init_empty_weights():
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    block = torch.empty(max(shape.numel() for shape in shapes.values()), dtype=torch.bfloat16).normal_(0, 0.02)
    state = {name: block[: shape.numel()].view(shape) for name, shape in shapes.items()}
    state |= {
        name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in shapes if "norm" in name and "weight" in name
    }
    save_llava_layout(state, config, folder / BASE, SHARDS)
    CLIPVisionModel(vision).to(torch.bfloat16).save_pretrained(folder / TOWER)
    side = vision.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder / TOWER)
    sentences = [" ".join(f"w{number}" for number in range(start, start + 8)) for start in range(0, 4000, 8)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / BASE / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=600,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": "<unk>"}
    (folder / BASE / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def run(folder: Path, quantization: str | None = None) -> dict[str, Any]:
    """Load the model, run a forward pass, merge a frozen bank, and take a first step of the next; figures by stage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"device": str(device), "quantization": quantization, "stages": {}}
    base = _stage(figures, "load", lambda: llava_med.load(folder / BASE, device=device, quantization=quantization))
    batch = _batch(base, device)
    # There is no dropout. On some CPUs bitsandbytes repacks 4-bit layers at the first forward pass in evaluation mode,
    # and what it packs has no gradient.
    base.model.train()
    with torch.no_grad():
        _stage(figures, "forward", lambda: float(base.model(**_labelled_alone(batch)).loss))
    if device.type == "cuda":
        input_processor = base.input_processor(batch["input_ids"].shape[1], False)
        question = batch["input_ids"][0].tolist()
        images = {"pixel_values": batch["pixel_values"]}
        _stage(
            figures,
            "generate",
            lambda: answer_and_probability(input_processor, base.model, question, images, NEW_TOKENS),
        )
    stack = BankStack(base.model, "concatenate" if quantization else "merge")
    frozen = [_random_bank(base.model)]
    _stage(figures, "merge a frozen bank", partial(stack.set_frozen, frozen))
    stack.add_trainable(RANK, RANK)
    stack.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with tempfile.TemporaryDirectory() as work:
        trainer = _trainer(stack, frozen, device, Path(work))
        del frozen  # the penalties hold a copy
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

        def first_step() -> float:
            loss = trainer.training_step(model, batch, (batch["labels"] != IGNORE_INDEX).sum())
            optimizer.step()
            return float(loss)

        _stage(figures, "first step of a bank", first_step)
    moved = sum(float(b.detach().abs().sum()) for _, b in stack.trainable().values())
    assert moved > 0, "the step did not move the bank"
    return figures | {"environment": environment()}


def _trainer(stack: BankStack, frozen: Sequence[Bank], device: torch.device, folder: Path) -> BankTrainer:
    terms = BankPenalties(frozen, [True] * len(frozen), device)
    trainer = BankTrainer(
        stack=stack,
        samples=[],  # type: ignore[arg-type]  (the batch is given directly)
        collator=TrainingCollator(0),
        args=TrainingArguments(
            output_dir=str(folder),
            learning_rate=2e-4,
            weight_decay=0.0,
            optim="adamw_torch",
            bf16=True,
            use_cpu=device.type == "cpu",
            report_to="none",
        ),
        bank_shape=(RANK, RANK),
        objective=Objective(WeightedPenalties(terms, RegularizationConfig())),
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _random_bank(model: torch.nn.Module) -> Bank:
    matrices = {
        name: (torch.randn(RANK, linear.in_features) * 0.01, torch.randn(linear.out_features, RANK) * 0.01)
        for name, linear in language_linears(model).items()
    }
    return Bank("frozen", RANK, RANK, matrices)


def _batch(base: llava_med.LlavaMed, device: torch.device) -> dict[str, torch.Tensor]:
    """One sample: an image, a question and an answer of random words."""
    size = base.image_processor.crop_size["height"]
    words = torch.randint(300, 600, (1, QUESTION_TOKENS + ANSWER_TOKENS))
    ids = torch.cat([torch.full((1, base.patches), base.image_token_id), words], dim=1)
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = IGNORE_INDEX
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, size, size, dtype=torch.bfloat16),
        "labels": labels,
        "record_index": torch.zeros(1, dtype=torch.int64),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _labelled_alone(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    keep, targets = loss_mask(batch["labels"])
    inputs = {name: tensor for name, tensor in batch.items() if name != "record_index"}
    return {**inputs, "labels": targets, "shift_labels": targets, "logits_to_keep": keep}


def _stage(figures: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    entry = {"seconds": round(time.monotonic() - started, 1), "peak_resident_gb": round(peak, 2)}
    if torch.cuda.is_available():
        entry["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    figures["stages"][name] = entry
    print(f"{name:<24}" + "  ".join(f"{key} {value}" for key, value in entry.items()), flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The figures of `run`; nothing for `make`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("make", "run"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--size", choices=SIZES, default="7b", help="for `make`: the true shapes (7b), or tiny ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of `run` there")
    parser.add_argument("--quantization", choices=("4bit", "8bit"), help="for `run`: the base in 4 or 8 bits")
    args = parser.parse_args(argv)
    if args.action == "make":
        make(args.folder, args.size)
        return {}
    figures = run(args.folder, args.quantization)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
