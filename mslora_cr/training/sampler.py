"""The order in which samples are visited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from mslora_cr.data.collator import in_batches, padding_share
from mslora_cr.data.datasets import ConcatTrainDataset


class SampleOrder:
    """The samples of an epoch, in order."""

    def __init__(
        self, samples: ConcatTrainDataset, args: TrainingArguments, fixed: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            fixed: Positions of the samples, with repetitions, in the order of every epoch; otherwise each epoch
                shuffles them all, or groups those of one length, as `args.train_sampling_strategy` says.
        """
        self._samples, self._args, self._fixed = samples, args, fixed

    @cached_property
    def lengths(self) -> list[int]:
        """The samples' lengths in positions; no image is decoded for them."""
        return self._samples.lengths()

    @property
    def grouped(self) -> bool:
        return self._args.train_sampling_strategy == "group_by_length"

    def __len__(self) -> int:
        return len(self._samples if self._fixed is None else self._fixed)

    def of_epoch(self, epoch: int) -> Sequence[int]:
        """Return positions of the samples, the same on every rank."""
        if self._fixed is not None:
            return self._fixed
        generator = torch.Generator().manual_seed(self._args.seed + epoch)
        if self.grouped:
            accumulated = self._args.train_batch_size * self._args.gradient_accumulation_steps
            return get_length_grouped_indices(self.lengths, accumulated * self._args.world_size, generator=generator)
        return torch.randperm(len(self._samples), generator=generator).tolist()

    def padding_if_shuffled(self) -> float:
        """Return the share of padded positions in batches of a random order."""
        generator = torch.Generator().manual_seed(self._args.seed)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return padding_share(self.lengths, in_batches(order, self._args.train_batch_size))


class FixedOrderSampler(Sampler[int]):
    """Positions of samples in an order that depends on the epoch alone, so that it is the same on every rank and in a
    resumed run.

    Padding samples (`ConcatTrainDataset`) follow, up to a multiple of what all ranks take at once. accelerate would
    repeat samples from the start of the epoch instead: several ranks would train on other batches than one.
    """

    def __init__(self, order: Callable[[], Sequence[int]], count: int, padding_sample: int, multiple: int) -> None:
        """
        Args:
            order: Returns the positions of the epoch that begins.
            count: The number of positions in every epoch.
            padding_sample: The position of a padding sample.
            multiple: The number of samples that all ranks take at once.
        """
        self._order, self._count = order, count
        self._padding = [padding_sample] * (-count % multiple)

    def __len__(self) -> int:
        return self._count + len(self._padding)

    def __iter__(self) -> Iterator[int]:
        return iter([*self._order(), *self._padding])
