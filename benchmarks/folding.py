"""How exact and how quick merging is: eight banks merged into the base, or concatenated into one adapter.

    python -m benchmarks.folding
    python -m benchmarks.folding --size 7b --layers 2      # LLaVA-Med's shapes; times by 16 for all of it

Deviations are those of the logits from the float32 computation with every bank on its own, in float32 and in bfloat16,
whose unmerged computation deviates as well. Times are shown beside what merging cannot do without: the matrix products
alone, and one copy of the weights; and beside loading the weights from disk, which switching a stage does not do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from benchmarks.baselines import peft_all_active
from benchmarks.harness import Setting, finish, language_model, parse, random_banks, random_batch
from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.distributed.deepspeed import free_memory
from mslora_cr.models.language import language_linears

BANKS = 8


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("folding", __doc__, argv)
    banks = random_banks(setting.size, BANKS)
    deviations = _deviations(setting, banks)

    def folding(merge_mode: str, chosen: Sequence[Bank]) -> Callable[[], Any]:
        stack = BankStack(_base(setting, torch.bfloat16), merge_mode, reuse=merge_mode == "merge")
        return lambda: stack.set_frozen(chosen)

    def products() -> Callable[[], Any]:
        pairs = [[bank.matrices[name] for bank in banks] for name in banks[0].matrices]
        stacked = [
            (torch.cat([a for a, _ in pair]).to(setting.device), torch.cat([b for _, b in pair], 1).to(setting.device))
            for pair in pairs
        ]
        return lambda: [right @ left for left, right in stacked]

    def copies() -> Callable[[], Any]:
        weights = _weights(setting)
        return lambda: [weight.clone() for weight in weights]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"

        def loading() -> Callable[[], Any]:
            save_file({str(number): weight.cpu().clone() for number, weight in enumerate(_weights(setting))}, file)
            return lambda: [tensor.to(setting.device, copy=True) for tensor in load_file(file).values()]

        seconds, too_large = setting.measured(
            {
                "merge": partial(folding, "merge", banks),
                "switch to 7 banks": partial(folding, "merge", banks[:-1]),
                "concatenate": partial(folding, "concatenate", banks),
                "products alone": products,
                "copy of the weights": copies,
                "load from disk": loading,
            }
        )
    linears = language_linears(language_model(setting.size, torch.device("meta"))).values()
    return finish(
        setting,
        seconds,
        {"merge_over_products": ("merge", "products alone"), "merge_over_copy": ("merge", "copy of the weights")},
        extra={
            "deviation": deviations,
            "merged_parameters": sum(linear.weight.numel() for linear in linears),
            "out_of_memory": too_large,
        },
    )


def _base(setting: Setting, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The same weights whatever the dtype: those that bfloat16 can hold."""
    return language_model(setting.size, setting.device).to(torch.bfloat16).to(dtype)


def _weights(setting: Setting) -> list[Tensor]:
    """What merging changes."""
    return [linear.weight.detach() for linear in language_linears(_base(setting, torch.bfloat16)).values()]


@torch.inference_mode()
def _deviations(setting: Setting, banks: Sequence[Bank]) -> dict[str, dict[str, float]]:
    """Of the logits: the root of the mean square against that of the logits, and the share of equal best words."""
    ids = random_batch(setting.size, 1, setting.device)["input_ids"]
    expected: Tensor | None = None
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for merge_mode in ("unmerged", "merge", "concatenate"):
            free_memory()  # of the model before: at 7B two in float32 do not fit
            base = _base(setting, dtype)
            if merge_mode == "unmerged":
                model: Any = peft_all_active(base, banks, train_last=False)
            else:
                stack = BankStack(base, merge_mode)
                stack.set_frozen(banks)
                model = stack.model
                del stack
            logits = model.eval()(input_ids=ids).logits.float()
            expected = logits if expected is None else expected
            found[f"{merge_mode}, {str(dtype).removeprefix('torch.')}"] = {
                "relative": float((logits - expected).norm() / expected.norm()),
                "same_word": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
            }
            del base, model
    return found


if __name__ == "__main__":
    main()
