"""Records as data sets of samples, and LLaVA-Med's way from one to the other. Images are decoded here: in the data
loader's workers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mslora_cr.data.collator import Sample, TrainingCollator
from mslora_cr.data.features import FeatureCache
from mslora_cr.data.images import load_image, preprocess, resolve_image
from mslora_cr.data.preparation import Collate, Preparation, Prompt
from mslora_cr.data.prompts import (
    IGNORE_INDEX,
    Encoded,
    Turn,
    encode_conversation,
    encode_next_prompt,
    encode_prompt,
    expand_images,
    generation_prompt,
)
from mslora_cr.data.records import DataError, TestRecord, TestRecords, TrainingRecord, TrainingRecords, shown_images
from mslora_cr.data.tokenizer import Tokenizer


def paths_of(names: Sequence[Sequence[str]], roots: Sequence[Path]) -> list[Path]:
    """Every image that some records show, once.

    Args:
        names: of each record's.

    Raises:
        DataError: one is missing or outside its root.
    """
    return [resolve_image(name, roots) for name in dict.fromkeys(name for shown in names for name in shown)]


@dataclass(frozen=True)
class Preprocessing:
    """LLaVA-Med's `Preparation`: the model's tokenizer and image processor, and the run's choices."""

    tokenizer: Tokenizer
    image_processor: Any
    image_token_id: int
    patches: int
    max_length: int = 2048
    all_images: bool = False
    features: FeatureCache | None = None
    """Where the tower's features are read from, if the model takes them instead of pixels."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,)

    @property
    def shares_openings(self) -> bool:
        return True

    def image_paths(self, records: TrainingRecords | TestRecords, roots: Sequence[Path]) -> list[Path]:
        """As `paths_of`."""
        return paths_of([self.image_names(record) for record in records], roots)

    def image_names(self, record: TrainingRecord | TestRecord) -> tuple[str, ...]:
        """As `shown_images`."""
        return shown_images(record, self.all_images)

    def pictures(self, names: Sequence[str], roots: Sequence[Path]) -> Tensor:
        """(images, 3, height, width) float32; or the tower's features, (images, positions, width), where cached."""
        paths = [resolve_image(name, roots) for name in names]
        if self.features is not None and paths:
            return torch.stack([self.features.load(path) for path in paths])
        return self.shown([load_image(path) for path in paths])

    def shown(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, 3, height, width) float32."""
        pixels = [preprocess(image, self.image_processor) for image in images]
        size = self.image_processor.crop_size
        return torch.stack(pixels) if pixels else torch.empty(0, 3, size["height"], size["width"])

    def sample(self, index: int, record: TrainingRecord, roots: Sequence[Path]) -> Sample:
        encoded = self._encode(record)
        pixels = self.pictures(self.image_names(record), roots)
        return Sample(index=index, input_ids=encoded.input_ids, labels=encoded.labels, pixel_values=pixels)

    def length(self, record: TrainingRecord, roots: Sequence[Path]) -> int:
        return len(self._encode(record).input_ids)

    def padding_sample(self, sample: Sample, index: int) -> Sample:
        return {**sample, "index": index, "labels": [IGNORE_INDEX] * len(sample["labels"])}

    def collator(self, multiple: int = 1) -> Collate:
        return TrainingCollator(self.tokenizer.pad_token_id, multiple)

    def prompt(self, record: TestRecord, roots: Sequence[Path]) -> Prompt:
        names = self.image_names(record)
        ids = encode_prompt(self.tokenizer, generation_prompt(record.text, len(names)))
        ids = self.expand(Encoded(ids, [IGNORE_INDEX] * len(ids))).input_ids
        images = tuple(resolve_image(name, roots) for name in names)
        cut = len(ids) - ids[::-1].index(self.image_token_id) if images else 0
        return Prompt(tuple(ids[:cut]), tuple(ids[cut:]), images)

    def answering_batch(self, prompts: Sequence[Prompt], shown: Sequence[Tensor]) -> dict[str, Tensor]:
        """`pixel_values`, the images of all prompts one after another; nothing where there are none."""
        pixels = [images for images in shown if len(images)]
        return {"pixel_values": torch.cat(pixels)} if pixels else {}

    def asked(self, earlier: Sequence[Turn], question: str, shown: Tensor) -> tuple[list[int], dict[str, Tensor]]:
        ids = encode_next_prompt(self.tokenizer, earlier, question, len(shown))
        length = len(ids) + len(shown) * (self.patches - 1)
        if length > self.max_length:
            raise ValueError(f"it takes {length} positions, more than data.max_length = {self.max_length}")
        ids = self.expand(Encoded(ids, [IGNORE_INDEX] * len(ids))).input_ids
        return ids, self.answering_batch([], [shown])

    def expand(self, encoded: Encoded) -> Encoded:
        return expand_images(encoded, self.image_token_id, self.patches, self.max_length)

    def _encode(self, record: TrainingRecord) -> Encoded:
        return self.expand(encode_conversation(self.tokenizer, record.turns, len(self.image_names(record))))


class TrainDataset(Dataset[Any]):
    """The training samples of a task."""

    def __init__(self, records: TrainingRecords, roots: Sequence[Path], preprocessing: Preparation) -> None:
        self.records, self.roots, self.preprocessing = records, roots, preprocessing

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.preprocessing.sample(index, self.records[index], self.roots)
        except ValueError as error:
            raise self._at(index, error) from None

    def lengths(self) -> list[int]:
        """Positions of every sample, image patches included, without decoding an image."""
        counted = []
        for index, record in enumerate(self.records):
            try:
                counted.append(self.preprocessing.length(record, self.roots))
            except ValueError as error:
                raise self._at(index, error) from None
        return counted

    def _at(self, index: int, error: ValueError) -> DataError:
        return DataError(f"{self.records.path}: {self.records.place(index)}: {error}")


class ConcatTrainDataset(ConcatDataset[Any]):
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

    def __getitem__(self, index: int) -> Any:
        if index == len(self):
            return self.parts[0].preprocessing.padding_sample(self.parts[0][0], index)
        return {**super().__getitem__(index), "index": index}

    def lengths(self) -> list[int]:
        """Positions of every sample, as `TrainDataset.lengths`."""
        return [length for part in self.parts for length in part.lengths()]

    def place(self, index: int) -> str:
        """Where a sample's record is, for errors."""
        part = bisect_right(self.cumulative_sizes, index)
        records = self.parts[part].records
        place = records.place(index - ([0, *self.cumulative_sizes][part]))
        return place if len(self.parts) == 1 else f"{records.path}: {place}"


class EvalDataset:
    """The questions of a task's test file as generation prompts."""

    def __init__(self, records: TestRecords, roots: Sequence[Path], preprocessing: Preparation) -> None:
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
        try:
            prompt = self.preprocessing.prompt(self.records[index], self.roots)
        except ValueError as error:
            raise self._at(index, error) from None
        return replace(prompt, opening=openings.setdefault(prompt.opening, prompt.opening))

    def pictures(self, index: int) -> Any:
        """A question's images, as `Preparation.pictures`.

        Raises:
            DataError: an image cannot be read.
        """
        prepare = self.preprocessing
        try:
            return prepare.pictures(prepare.image_names(self.records[index]), self.roots)
        except DataError as error:
            raise self._at(index, error) from None

    def _at(self, index: int, error: ValueError) -> DataError:
        return DataError(f"{self.records.path}: {self.records.place(index)}: {error}")
