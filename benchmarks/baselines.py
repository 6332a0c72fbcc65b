"""What the figures are held against: PEFT with every bank active, the penalties' formulas under autograd, and answers
from whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.fused import FusedLinear, PeftLinear
from mslora_cr.banks.io import lora_config
from mslora_cr.generation.prefix_decoder import Ends

Pairs = dict[str, tuple[Tensor, Tensor]]


def peft_all_active(model: LlavaForConditionalGeneration, banks: Sequence[Bank], train_last: bool) -> PeftModel:
    """PEFT with all banks active and unmerged; only the last one is trained, if any."""
    names = [bank.name for bank in banks]
    peft = get_peft_model(model, lora_config(banks[0].matrices, banks[0].rank, banks[0].alpha), adapter_name=names[0])
    for bank in banks[1:]:
        peft.add_adapter(bank.name, lora_config(bank.matrices, bank.rank, bank.alpha))
    # set_adapter takes several names only here, and makes every one of them trainable unless told otherwise.
    peft.base_model.set_adapter(names, inference_mode=True)
    if train_last:
        peft.set_requires_grad(names[-1], True)
    with torch.no_grad():
        for bank in banks:
            for name, pair in adapter_matrices(peft, bank.name).items():
                for parameter, matrix in zip(pair, bank.matrices[name], strict=True):
                    parameter.copy_(matrix)
    return peft


def use_pefts_layer(model: nn.Module) -> None:
    """Let the fused layers of a model compute as PEFT's do."""
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.forward = partial(PeftLinear.forward, module)  # type: ignore[method-assign]


def adapter_matrices(peft: PeftModel, adapter: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """An adapter's parameters: linear layer's name → (A, B)."""
    return {
        name.removeprefix("base_model.model."): (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A") and adapter in module.lora_A
    }


def autograd_penalties(
    current: Pairs, frozen: Sequence[Pairs], same_modality: Sequence[bool], alpha: float, beta: float
) -> Tensor:
    """``alpha · contrastive + beta · orthogonality``, matrix by matrix as the formulas are written, with a graph.

    Source: tests/golden/README.md.
    """
    contrastive = torch.zeros(())
    for bank, same in zip(frozen, same_modality, strict=True):
        distances = [
            torch.linalg.norm(ours - other)
            for name, pair in current.items()
            for ours, other in zip(pair, bank[name], strict=True)
        ]
        similarity = torch.stack([torch.exp(-distance) for distance in distances]).mean()
        contrastive = contrastive + (1 - similarity if same else similarity)
    everyone = [*frozen, current]
    residuals = []
    for bank in everyone:
        for a, b in bank.values():
            identity = torch.eye(len(a), device=a.device, dtype=a.dtype)
            residuals.append((a @ a.T - identity).square().sum() + (b.T @ b - identity).square().sum())
    return alpha * contrastive + beta * torch.stack(residuals).mean()


def alternating(banks: int) -> list[bool]:
    """Flags of this many earlier banks, every other one of the task's own modality."""
    return [number % 2 == 0 for number in range(banks)]


@torch.inference_mode()
def generated(
    model: Any, prompts: Sequence[Sequence[int]], pixel_values: Tensor | None, tokenizer: Ends, max_new_tokens: int
) -> list[list[int]]:
    """The new ids of each prompt, up to and with `</s>`: whole prompts, padded on the left, through transformers'
    `generate`.

    Args:
        pixel_values: the images of all prompts, one after another; None without any.
    """
    length = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids = [[tokenizer.pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(real, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({} if pixel_values is None else {"pixel_values": pixel_values.to(device, model.dtype)}),
    )
    eos = tokenizer.eos_token_id
    new = output[:, length:].tolist()
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in new]
