"""The true shapes of LLaVA-Med v1.5 with random weights: loading, one forward, and the first step of a bank.

    python -m benchmarks.real_size make DIR          # 15.1 GB: four shards, bf16; CLIP beside them
    python -m benchmarks.real_size run DIR [--quantization 4bit] [--json FILE]

`run` states seconds and the process's peak resident memory after each stage, on the CPU or a GPU; on a GPU it also
generates an answer.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
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
)

from mslora_cr import llava_med
from mslora_cr.bank_stack import BankStack
from mslora_cr.evaluation.generate import greedy
from mslora_cr.training.ledger import environment
from mslora_cr.training.trainer import labelled_positions

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


def make(folder: Path) -> None:
    """Write the model and its tower. Every tensor is a piece of one random block, so memory stays at one shard."""
    vision = CLIPVisionConfig.from_dict(LlavaConfig().vision_config.to_dict())
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    text = MistralConfig(**{name: LLAVA_MED[name] for name in (*names, "vocab_size", "rms_norm_eps", "rope_theta")})
    with init_empty_weights():
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    block = torch.empty(max(shape.numel() for shape in shapes.values()), dtype=torch.bfloat16).normal_(0, 0.02)
    state = {name: block[: shape.numel()].view(shape) for name, shape in shapes.items()}
    state |= {
        name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in shapes if "norm" in name and "weight" in name
    }
    llava_med.save_llava_layout(state, LLAVA_MED, folder / BASE, SHARDS)
    CLIPVisionModel(vision).to(torch.bfloat16).save_pretrained(folder / TOWER)
    size = vision.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder / TOWER)
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
    """Load the model, run a forward pass, and take the first step of a bank; figures by stage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"device": str(device), "quantization": quantization, "stages": {}}
    base = _stage(figures, "load", lambda: llava_med.load(folder / BASE, device=device, quantization=quantization))
    batch = _batch(base, device)
    # There is no dropout. On some CPUs bitsandbytes repacks 4-bit layers at the first forward pass in evaluation mode,
    # and what it packs has no gradient.
    base.model.train()
    with torch.no_grad():
        _stage(figures, "forward", lambda: float(base.model(**batch).loss))
    if device.type == "cuda":
        question = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        _stage(figures, "generate", lambda: greedy(base.model, question, base.tokenizer, NEW_TOKENS))
    stack = BankStack(base.model, "concatenate" if quantization else "merge")
    stack.add_live(RANK, RANK)
    stack.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stack.model.train()
    optimizer = torch.optim.AdamW([parameter for pair in stack.live().values() for parameter in pair], lr=2e-4)

    def first_step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = stack.model(**batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    _stage(figures, "first step of a bank", first_step)
    moved = sum(float(b.detach().abs().sum()) for _, b in stack.live().values())
    assert moved > 0, "the step did not move the bank"
    return figures | {"environment": environment()}


def _batch(base: llava_med.LlavaMed, device: torch.device) -> dict[str, torch.Tensor]:
    """One sample: an image, a question and an answer of random words."""
    size = base.image_processor.crop_size["height"]
    words = torch.randint(300, 600, (1, QUESTION_TOKENS + ANSWER_TOKENS))
    ids = torch.cat([torch.full((1, base.patches), base.image_token_id), words], dim=1)
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    keep, targets = labelled_positions(labels)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": torch.randn(1, 3, size, size, dtype=torch.bfloat16, device=device),
        "labels": targets.to(device),
        "shift_labels": targets.to(device),
        "logits_to_keep": keep.to(device),
    }


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("make", "run"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of `run` there")
    parser.add_argument("--quantization", choices=("4bit", "8bit"), help="for `run`: the base in 4 or 8 bits")
    args = parser.parse_args()
    if args.action == "make":
        make(args.folder)
        return 0
    figures = run(args.folder, args.quantization)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
