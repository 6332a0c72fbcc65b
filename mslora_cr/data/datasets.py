"""Records as data sets of samples. Images are decoded here, in the data loader's workers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch.utils.data import ConcatDataset, Dataset, get_worker_info

from mslora_cr.data.features import EncodedImage
from mslora_cr.data.input_processor import InputProcessor, Prompt
from mslora_cr.data.records import DataError, TestRecord, TrainingRecord

Record_co = TypeVar("Record_co", TrainingRecord, TestRecord, covariant=True)


class Records(Protocol[Record_co]):
    """Records whose locations can be named."""

    @property
    def path(self) -> Path: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record_co: ...
    def __iter__(self) -> Iterator[Record_co]: ...
    def location(self, index: int) -> str:
        """Describe where a record is in the file, in words."""


KEPT_BYTES = 512 << 20
"""Decoded samples of up to this many bytes are kept from epoch to epoch, if the whole data set fits."""


class TrainDataset(Dataset[Any]):
    """The training samples of a task. Those of a small data set are decoded only once if no workers decode them; a
    worker ends with its epoch."""

    def __init__(
        self, records: Records[TrainingRecord], roots: Sequence[Path], input_processor: InputProcessor
    ) -> None:
        self.records, self.roots, self.input_processor = records, roots, input_processor
        self._cached: dict[int, Any] = {}
        self._free_bytes = KEPT_BYTES

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        if index in self._cached:
            return self._cached[index]
        try:
            sample = self.input_processor.sample(index, self.records[index], self.roots)
        except ValueError as error:
            raise _at(self.records, index, error) from None
        if self._free_bytes > 0 and get_worker_info() is None:
            self._keep(index, sample)
        return sample

    def _keep(self, index: int, sample: Any) -> None:
        self._free_bytes -= _decoded_bytes(sample)
        self._cached[index] = sample
        if self._free_bytes <= 0:  # A part of a large data set is not worth its memory.
            self._cached.clear()

    def lengths(self) -> list[int]:
        """Return the number of positions of every sample, image patches included, without decoding an image."""
        counted = []
        for index, record in enumerate(self.records):
            try:
                counted.append(self.input_processor.length(record, self.roots))
            except ValueError as error:
                raise _at(self.records, index, error) from None
        return counted


def _at(records: Records[Any], index: int, error: ValueError) -> DataError:
    return DataError(f"{records.path}: {records.location(index)}: {error}")


def _decoded_bytes(sample: Any) -> int:
    """Estimate the bytes of a sample's images, as RGB or as the model takes them, and of its lists of ids or its
    text."""
    pixels = sample.get("pixel_values")
    images = sum(
        image.nbytes if isinstance(image, EncodedImage) else 3 * image.width * image.height
        for image in sample.get("images", ())
    )
    text = 64 * len(sample.get("input_ids") or sample.get("text", ""))
    return text + int(images if pixels is None else pixels.nbytes)


class ConcatTrainDataset(ConcatDataset[Any]):
    """The training samples of one task or several, one after another; `index` counts through all of them.

    The position after the last is a padding sample, which fills up a batch: the first sample without a label.
    """

    def __init__(self, parts: Sequence[TrainDataset]) -> None:
        super().__init__(parts)
        self.parts = parts

    @property
    def counts(self) -> list[int]:
        """Return how many samples each part has."""
        return [len(part) for part in self.parts]

    def __getitem__(self, index: int) -> Any:
        if index == len(self):
            return self.parts[0].input_processor.padding_sample(self.parts[0][0], index)
        return {**super().__getitem__(index), "index": index}

    def lengths(self) -> list[int]:
        """Return the number of positions of every sample, as `TrainDataset.lengths` does."""
        return [length for part in self.parts for length in part.lengths()]

    def location(self, index: int) -> str:
        """Describe where a sample's record is, for errors."""
        part = bisect_right(self.cumulative_sizes, index)
        records = self.parts[part].records
        location = records.location(index - ([0, *self.cumulative_sizes][part]))
        return location if len(self.parts) == 1 else f"{records.path}: {location}"


class EvalDataset:
    """The questions of a task's test file as generation prompts."""

    def __init__(self, records: Records[TestRecord], roots: Sequence[Path], input_processor: InputProcessor) -> None:
        self.records, self.roots, self.input_processor = records, roots, input_processor

    def __len__(self) -> int:
        return len(self.records)

    def prompts(self) -> list[Prompt]:
        """Return every question's prompt, image patches included, without reading an image.

        Raises:
            DataError: An image is missing, or a prompt is cut through one.
        """
        openings: dict[tuple[int, ...], tuple[int, ...]] = {}
        return [self._prompt(index, openings) for index in range(len(self))]

    def _prompt(self, index: int, openings: dict[tuple[int, ...], tuple[int, ...]]) -> Prompt:
        try:
            prompt = self.input_processor.prompt(self.records[index], self.roots)
        except ValueError as error:
            raise _at(self.records, index, error) from None
        return replace(prompt, opening=openings.setdefault(prompt.opening, prompt.opening))

    def load_images(self, index: int) -> Any:
        """Load a question's images, as `InputProcessor.load_images` does.

        Raises:
            DataError: An image cannot be read.
        """
        processor = self.input_processor
        try:
            return processor.load_images(processor.image_names(self.records[index]), self.roots)
        except DataError as error:
            raise _at(self.records, index, error) from None


class ConcatEvalDataset:
    """Questions of several tasks, one task after another, counted through all of them."""

    def __init__(self, parts: Sequence[EvalDataset]) -> None:
        self.parts = parts
        self._positions = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def input_processor(self) -> InputProcessor:
        return self.parts[0].input_processor

    @property
    def records(self) -> Iterator[TestRecord]:
        return (record for part in self.parts for record in part.records)

    def prompts(self) -> list[Prompt]:
        """Return every question's prompt, as `EvalDataset.prompts` does."""
        return [prompt for part in self.parts for prompt in part.prompts()]

    def load_images(self, index: int) -> Any:
        """Load a question's images, as `EvalDataset.load_images` does."""
        part, index_in_part = self._positions[index]
        return part.load_images(index_in_part)
