"""Memory per GPU by ZeRO stage, computed from the parameters that LLaVA-Med v1.5 and its banks have.

    python -m benchmarks.zero_memory                       # 1, 2, 4 and 8 GPUs, the eighth task, rank 64, bfloat16
    python -m benchmarks.zero_memory --gpus 4 --task 1 --rank 128

Counted are what lies on a GPU from the first step to the last: weights, gradients, optimizer state, frozen banks. Not
counted are activations, which depend on the batch (measured: `benchmarks.real_size`), the CUDA context,
and ZeRO's buckets (0.1 GB each at the sizes in `configs/deepspeed`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from accelerate import init_empty_weights
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from benchmarks.real_size import LLAVA_MED
from mslora_cr.bank_stack import language_linears

STAGES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "ZeRO-3, offloaded": 4}
BF16, FP32, ADAM = 2, 4, 8
"""Bytes per number: half precision, float32, and AdamW's two moments in float32."""
ZERO3 = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3.json"


def parameters(rank: int) -> tuple[int, int]:
    """How many parameters the base model and one bank have."""
    vision = CLIPVisionConfig.from_dict(LlavaConfig().vision_config.to_dict())
    known = {key: value for key, value in LLAVA_MED.items() if key in MistralConfig().to_dict()}
    text = MistralConfig(**{key: value for key, value in known.items() if key not in ("architectures", "model_type")})
    with init_empty_weights():
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    base = sum(parameter.numel() for parameter in model.parameters())
    linears = language_linears(model).values()
    return base, sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def per_gpu(base: int, bank: int, stage: int, gpus: int, task: int) -> dict[str, float]:
    """Bytes on each GPU in bfloat16 training, by what they hold.

    ZeRO shares the optimizer's state (1), gradients too (2), and weights (3). ZeRO-1 and 2 hold the live bank in
    bfloat16 with a float32 master copy; DDP and ZeRO-3 hold it in float32, ZeRO-3 with a master copy besides. DDP has
    its gradients a second time in the buckets that it sends.

    Args:
        task: position in the stream, from 1; the penalties keep the banks before it in float32, on each GPU.
    """
    live_bytes = BF16 if stage in (1, 2) else FP32
    master = 0 if stage == 0 else FP32
    gradient = bank * FP32 * min(gpus, 2) if stage == 0 else bank * BF16 / (gpus if stage >= 2 else 1)
    optimizer = bank * (ADAM + master) / (gpus if stage >= 1 else 1)
    weights = (base * BF16 + bank * live_bytes) / (gpus if stage >= 3 else 1)
    gathered = 0
    if stage >= 3:
        settings = json.loads(ZERO3.read_text(encoding="utf-8"))["zero_optimization"]
        gathered = BF16 * min(settings["stage3_max_live_parameters"], base + bank) if gpus > 1 or stage == 4 else 0
    if stage == 4:
        weights = optimizer = gradient = 0
    frozen = FP32 * bank * (task - 1)
    return {
        "weights": weights,
        "gathered at once": gathered,
        "gradients": gradient,
        "optimizer": optimizer,
        "frozen banks": frozen,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zero_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs (1 2 4 8)")
    parser.add_argument("--rank", type=int, default=64, help="rank of a bank (64)")
    parser.add_argument("--task", type=int, default=8, help="position of the task in the stream, from 1 (8)")
    args = parser.parse_args()
    base, bank = parameters(args.rank)
    print(
        f"base model {base:,} parameters, one bank {bank:,}; task {args.task}, rank {args.rank}, bfloat16; GB per GPU\n"
    )
    names = list(per_gpu(base, bank, 0, 1, args.task))
    print(f"| stage | GPUs | {' | '.join(names)} | sum |\n| --- | --- |{' --- |' * (len(names) + 1)}")
    for name, stage in STAGES.items():
        for gpus in args.gpus:
            held = per_gpu(base, bank, stage, gpus, args.task)
            figures = [f"{value / 1e9:.1f}" for value in [*held.values(), sum(held.values())]]
            print(f"| {name} | {gpus} | {' | '.join(figures)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
