"""Positions of a batch that predict a label, and inputs of the linear layers that a bank adapts, for methods that store
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mslora_cr.banks.io import PEFT_PREFIX
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.distributed.comm import all_reduce_sum, rank, world_size
from mslora_cr.models.language import is_adapted


def loss_mask(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions that predict a label, and the labels they predict.

    Args:
        labels: (batch, length) int64, `IGNORE_INDEX` where there is none.

    Returns:
        A (batch, length) bool mask of positions that predict a label, for `logits_to_keep`, and the labels they
        predict, (kept,).
    """
    shifted = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    keep = shifted != IGNORE_INDEX
    return keep, shifted[keep]


@torch.no_grad()
def layer_inputs(
    model: nn.Module, batch_of: Callable[[int], dict[str, Any]], count: int, samples: int, tokens: int, seed: int
) -> dict[str, Tensor]:
    """Return the inputs of every linear layer that a bank adapts, in the current model, without dropout.

    The seed alone chooses samples and tokens, and ranks share the samples, so any number of processes gets the same
    columns. Under ZeRO-3 all ranks take part in each pass. Call it on every rank.

    Args:
        model: The model, with a bank on top.
        batch_of: Maps a sample's position to its batch of one, on the model's device.
        samples: The most samples to take.
        tokens: The most positions of each.
        seed: Chooses samples and tokens.

    Returns:
        By linear layer's name (in, samples · tokens), float32, on the CPU; zeros if a sample has fewer tokens.
    """
    layers = {name.removeprefix(PEFT_PREFIX): m for name, m in model.named_modules() if is_adapted(m)}
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    collected = {name: torch.zeros(len(chosen), tokens, layer.in_features) for name, layer in layers.items()}
    model.eval()
    for start in range(0, len(chosen), world_size()):
        first = start + rank()
        index = chosen[min(first, len(chosen) - 1)]
        batch = batch_of(index)
        generator = torch.Generator().manual_seed(seed + index)
        positions = torch.randperm(batch["input_ids"].shape[1], generator=generator)[:tokens]
        with _recorded(layers, positions) as seen:
            model(**batch, logits_to_keep=1, use_cache=False)
        if first < len(chosen):
            for name, inputs in seen.items():
                collected[name][first, : len(positions)] = inputs
    return {name: all_reduce_sum(inputs).flatten(0, 1).T for name, inputs in collected.items()}


@contextmanager
def _recorded(layers: dict[str, nn.Module], positions: Tensor) -> Iterator[dict[str, Tensor]]:
    """Collect the layers' inputs at these positions, (positions, in), on the CPU, from passes of one sample inside the
    block."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].flatten(0, -2)[positions.to(inputs[0].device)].to("cpu", torch.float32)

        return take

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
