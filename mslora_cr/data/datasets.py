"""Records as data sets of samples. Images are decoded here: in the data loader's workers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mslora_cr.data.features import FeatureCache
from mslora_cr.data.images import load_image, preprocess, resolve_image
from mslora_cr.data.prompts import (
    IGNORE_INDEX,
    Encoded,
    encode_conversation,
    encode_prompt,
    expand_images,
    generation_prompt,
)
from mslora_cr.data.records import DataError, TestRecord, TestRecords, TrainingRecord, TrainingRecords
from mslora_cr.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Preprocessing:
    """What turns a record into tensors: the model's tokenizer and image processor, and the run's choices."""

    tokenizer: Tokenizer
    image_processor: Any
    image_token_id: int
    patches: int
    max_length: int = 2048
    all_images: bool = False
    features: FeatureCache | None = None
    """Where the tower's features are read from, if the model takes them instead of pixels."""

    def image_paths(self, records: TrainingRecords | TestRecords, roots: Sequence[Path]) -> list[Path]:
        """Every image that some records show, once.

        Raises:
            DataError: one is missing or outside its root.
        """
        names = dict.fromkeys(name for record in records for name in self.image_names(record))
        return [resolve_image(name, roots) for name in names]

    def image_names(self, record: TrainingRecord | TestRecord) -> tuple[str, ...]:
        """The images of a record that are shown: the first, as published, unless all are asked for."""
        return record.images if self.all_images else record.images[:1]

    def pixel_values(self, names: Sequence[str], roots: Sequence[Path]) -> Tensor:
        """(images, 3, height, width) float32; or the tower's features, (images, positions, width), where cached."""
        paths = [resolve_image(name, roots) for name in names]
        if self.features is not None and paths:
            return torch.stack([self.features.load(path) for path in paths])
        images = [preprocess(load_image(path), self.image_processor) for path in paths]
        size = self.image_processor.crop_size
        return torch.stack(images) if images else torch.empty(0, 3, size["height"], size["width"])

    def expand(self, encoded: Encoded) -> Encoded:
        return expand_images(encoded, self.image_token_id, self.patches, self.max_length)


class Sample(TypedDict):
    """One unpadded sample. `index` is the record's position in its file."""

    index: int
    input_ids: list[int]
    labels: list[int]
    pixel_values: Tensor


class TrainDataset(Dataset[Sample]):
    """The training samples of a task."""

    def __init__(self, records: TrainingRecords, roots: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.records, self.roots, self.preprocessing = records, roots, preprocessing

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        try:
            encoded = self._encode(record)
            pixels = self.preprocessing.pixel_values(self.preprocessing.image_names(record), self.roots)
        except ValueError as error:
            raise self._at(index, error) from None
        return Sample(index=index, input_ids=encoded.input_ids, labels=encoded.labels, pixel_values=pixels)

    def lengths(self) -> list[int]:
        """Positions of every sample, image patches included, without reading an image."""
        found = []
        for index, record in enumerate(self.records):
            try:
                found.append(len(self._encode(record).input_ids))
            except ValueError as error:
                raise self._at(index, error) from None
        return found

    def _encode(self, record: TrainingRecord) -> Encoded:
        names = self.preprocessing.image_names(record)
        return self.preprocessing.expand(encode_conversation(self.preprocessing.tokenizer, record.turns, len(names)))

    def _at(self, index: int, error: ValueError) -> DataError:
        return DataError(f"{self.records.path}: {self.records.place(index)}: {error}")


class ConcatTrainDataset(ConcatDataset[Sample]):
    """The training samples of one task or several, one behind another; `index` counts through all of them.

    The position after the last is a padding sample, which fills up a batch: the first sample without a label.
    """

    def __init__(self, parts: Sequence[TrainDataset]) -> None:
        super().__init__(parts)
        self.parts = parts

    @property
    def counts(self) -> list[int]:
        """How many samples each part has."""
        return [len(part) for part in self.parts]

    def __getitem__(self, index: int) -> Sample:
        if index == len(self):
            first = self.parts[0][0]
            return {**first, "index": index, "labels": [IGNORE_INDEX] * len(first["labels"])}
        sample: Sample = super().__getitem__(index)
        return {**sample, "index": index}

    def lengths(self) -> list[int]:
        """Positions of every sample, as `TrainDataset.lengths`."""
        return [length for part in self.parts for length in part.lengths()]

    def place(self, index: int) -> str:
        """Where a sample's record is, for errors."""
        part = bisect_right(self.cumulative_sizes, index)
        records = self.parts[part].records
        place = records.place(index - ([0, *self.cumulative_sizes][part]))
        return place if len(self.parts) == 1 else f"{records.path}: {place}"


@dataclass(frozen=True)
class Prompt:
    """What a question is answered from, cut behind its last image."""

    opening: tuple[int, ...]
    """Ids up to the last image's patches, them included; none without an image. Equal ones are one object."""
    rest: tuple[int, ...]
    images: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.opening) + len(self.rest)


class EvalDataset:
    """The questions of a task's test file as generation prompts."""

    def __init__(self, records: TestRecords, roots: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.records, self.roots, self.preprocessing = records, roots, preprocessing

    def __len__(self) -> int:
        return len(self.records)

    def prompts(self) -> list[Prompt]:
        """Every question's prompt, image patches included, without reading an image.

        Raises:
            DataError: an image is missing, or a prompt is cut through one.
        """
        openings: dict[tuple[int, ...], tuple[int, ...]] = {}
        return [self._prompt(index, openings) for index in range(len(self))]

    def _prompt(self, index: int, openings: dict[tuple[int, ...], tuple[int, ...]]) -> Prompt:
        record, prepare = self.records[index], self.preprocessing
        names = prepare.image_names(record)
        try:
            ids = encode_prompt(prepare.tokenizer, generation_prompt(record.text, len(names)))
            ids = prepare.expand(Encoded(ids, [IGNORE_INDEX] * len(ids))).input_ids
            images = tuple(resolve_image(name, self.roots) for name in names)
        except ValueError as error:
            raise self._at(index, error) from None
        cut = len(ids) - ids[::-1].index(prepare.image_token_id) if images else 0
        opening = tuple(ids[:cut])
        return Prompt(openings.setdefault(opening, opening), tuple(ids[cut:]), images)

    def pixel_values(self, index: int) -> Tensor:
        """Of a question's images, as `Preprocessing.pixel_values`.

        Raises:
            DataError: an image cannot be read.
        """
        try:
            return self.preprocessing.pixel_values(self.preprocessing.image_names(self.records[index]), self.roots)
        except DataError as error:
            raise self._at(index, error) from None

    def _at(self, index: int, error: ValueError) -> DataError:
        return DataError(f"{self.records.path}: {self.records.place(index)}: {error}")
