"""The order in which samples are visited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler


class FixedOrderSampler(Sampler[int]):
    """Positions of samples in an order that the epoch alone decides, so that it is the same on every rank and in a
    resumed run.

    Behind them come padding samples (`ConcatTrainDataset`), up to a multiple of what all ranks take at once. accelerate
    would repeat samples from the start of the epoch instead: several ranks would train on other batches than one.
    """

    def __init__(self, order: Callable[[], Sequence[int]], count: int, padding_sample: int, multiple: int) -> None:
        """
        Args:
            order: the positions of the epoch that begins.
            count: how many they are, in every epoch.
            padding_sample: the position of a padding sample.
            multiple: how many samples all ranks take at once.
        """
        self._order, self._count = order, count
        self._padding = [padding_sample] * (-count % multiple)

    def __len__(self) -> int:
        return self._count + len(self._padding)

    def __iter__(self) -> Iterator[int]:
        return iter([*self._order(), *self._padding])
