"""Makes batches of LLaVA-Med's samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from mslora_cr.data.prompts import IGNORE_INDEX


def length_multiple(device: torch.device) -> int:
    """On a GPU, lengths of training batches are rounded up to a multiple of this: cuDNN plans its attention anew for
    each new length, which takes as long as half a step of a 7B model."""
    return 32 if device.type == "cuda" else 1


def rounded_up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is at least the number."""
    return -(-length // multiple) * multiple


class Sample(TypedDict):
    """One unpadded sample. `index` is the record's position in its file."""

    index: int
    input_ids: list[int]
    labels: list[int]
    pixel_values: Tensor


@dataclass(frozen=True)
class TrainingCollator:
    """Makes right-padded batches: `input_ids`, `labels`, `attention_mask` (batch, length) int64, `pixel_values`
    (images, 3, H, W) float32 unless no sample has an image, and `record_index` (batch,) int64, by which errors name
    records."""

    pad_token_id: int
    multiple: int = 1
    """Lengths of batches are multiples of this."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        length = rounded_up(max(len(sample["input_ids"]) for sample in samples), self.multiple)
        batch = {
            "input_ids": _padded([sample["input_ids"] for sample in samples], length, self.pad_token_id),
            "labels": _padded([sample["labels"] for sample in samples], length, IGNORE_INDEX),
            "attention_mask": _padded([[1] * len(sample["input_ids"]) for sample in samples], length, 0),
            "record_index": torch.tensor([sample["index"] for sample in samples]),
        }
        return batch | _stacked_pixels(samples)


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Return the share of positions without a token, in batches of samples padded to the longest of each.

    Args:
        batches: The samples of each batch, as indices into `lengths`; no batch is empty.
    """
    real, all_positions = 0, 0
    for batch in batches:
        real += sum(lengths[index] for index in batch)
        all_positions += len(batch) * max(lengths[index] for index in batch)
    return 1 - real / all_positions if all_positions else 0.0


def in_batches(order: Sequence[int], size: int) -> list[list[int]]:
    """Return consecutive samples of an order, `size` at a time."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _stacked_pixels(samples: Sequence[Sample]) -> dict[str, Tensor]:
    # Empty ones of text-only samples are left out: they have the shape of pixels, even beside cached features.
    pixels = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
    return {"pixel_values": torch.cat(pixels)} if pixels else {}
