"""Turns records into LLaVA-Med's inputs: the published protocol, with the model's tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mslora_cr.data.answers.boxes import BoxRule, filled
from mslora_cr.data.collator import Sample, TrainingCollator
from mslora_cr.data.features import FeatureCache
from mslora_cr.data.images import load_image, paths_of, preprocess, resolve_image
from mslora_cr.data.input_processor import Collate, LabelCount, Prompt
from mslora_cr.data.prompts import (
    IGNORE_INDEX,
    IMAGE_INDEX,
    Encoded,
    Message,
    Turn,
    encode_conversation,
    encode_next_prompt,
    encode_prompt,
    expand_images,
    filled_turns,
    generation_prompt,
)
from mslora_cr.data.records import TestRecord, TrainingRecord, shown_images
from mslora_cr.data.tokenizer import Tokenizer

SQUARE = BoxRule("square")
"""How LLaVA's models write boxes."""
TOWER_FEATURES = "features"
"""The name of the tower's features in a file of `data.features`."""


@dataclass(frozen=True)
class LlavaMedInputs:
    """LLaVA-Med's `InputProcessor`: the model's tokenizer and image processor, and the run's choices."""

    tokenizer: Tokenizer
    image_processor: Any
    image_token_id: int
    patches: int
    max_length: int = 2048
    all_images: bool = False
    features: FeatureCache | None = None
    """The store of the tower's features, if the model takes them instead of pixels."""

    @property
    def box_rule(self) -> BoxRule:
        return SQUARE

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,)

    @property
    def shares_openings(self) -> bool:
        return True

    def image_paths(self, records: Iterable[TrainingRecord | TestRecord], roots: Sequence[Path]) -> list[Path]:
        """As `paths_of`."""
        return paths_of([self.image_names(record) for record in records], roots)

    def image_names(self, record: TrainingRecord | TestRecord) -> tuple[str, ...]:
        """As `shown_images`."""
        return shown_images(record, self.all_images)

    def load_images(self, names: Sequence[str], roots: Sequence[Path]) -> Tensor:
        """Decode images to (images, 3, height, width) float32, or to the tower's features, (images, positions, width),
        where these are cached."""
        paths = [resolve_image(name, roots) for name in names]
        if self.features is not None and paths:
            return torch.stack([self.features.load(path)[TOWER_FEATURES] for path in paths])
        return self.process_images([load_image(path) for path in paths])

    def process_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Decode images to (images, 3, height, width) float32."""
        pixels = [preprocess(image, self.image_processor) for image in images]
        size = self.image_processor.crop_size
        return torch.stack(pixels) if pixels else torch.empty(0, 3, size["height"], size["width"])

    def sample(self, index: int, record: TrainingRecord, roots: Sequence[Path]) -> Sample:
        encoded = self._encode(record)
        # A conversation without a question, which is masked as a whole, has no place for its images.
        names = self.image_names(record) if self.image_token_id in encoded.input_ids else ()
        pixels = self.load_images(names, roots)
        return Sample(index=index, input_ids=encoded.input_ids, labels=encoded.labels, pixel_values=pixels)

    def length(self, record: TrainingRecord, roots: Sequence[Path]) -> int:
        return len(self._encode(record).input_ids)

    def count_labels(self, record: TrainingRecord, roots: Sequence[Path]) -> LabelCount:
        encoded = encode_conversation(self.tokenizer, record.turns, len(self.image_names(record)))
        labels, learned = (
            sum(label != IGNORE_INDEX for label in each.labels) for each in (encoded, self.expand(encoded))
        )
        images = encoded.input_ids.count(IMAGE_INDEX)
        return LabelCount(labels, learned, len(encoded.input_ids) + images * (self.patches - 1))

    def padding_sample(self, sample: Sample, index: int) -> Sample:
        return {**sample, "index": index, "labels": [IGNORE_INDEX] * len(sample["labels"])}

    def collator(self, multiple: int = 1) -> Collate:
        return TrainingCollator(self.tokenizer.pad_token_id, multiple)

    def prompt(self, record: TestRecord, roots: Sequence[Path]) -> Prompt:
        names = self.image_names(record)
        [question] = filled([record.question], record, self.box_rule)
        ids = encode_prompt(self.tokenizer, generation_prompt(question, len(names)))
        ids = self.expand(Encoded(ids, [IGNORE_INDEX] * len(ids))).input_ids
        images = tuple(resolve_image(name, roots) for name in names)
        cut = len(ids) - ids[::-1].index(self.image_token_id) if images else 0
        return Prompt(tuple(ids[:cut]), tuple(ids[cut:]), images)

    def prompt_length(self, record: TestRecord, roots: Sequence[Path]) -> int:
        images = len(self.image_names(record))
        ids = encode_prompt(self.tokenizer, generation_prompt(record.question, images))
        return len(ids) + images * (self.patches - 1)

    def answer_ids(self, question: str, images: int, answer: str) -> tuple[int, ...]:
        prompt = encode_prompt(self.tokenizer, generation_prompt(question, images))
        turns = [Message("human", question), Message("gpt", answer)]
        return tuple(encode_conversation(self.tokenizer, turns, images).input_ids[len(prompt) :])

    def answering_batch(self, prompts: Sequence[Prompt], images: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return `pixel_values`, the images of all prompts one after another; empty where there are none."""
        pixels = [of_prompt for of_prompt in images if len(of_prompt)]
        return {"pixel_values": torch.cat(pixels)} if pixels else {}

    def asked(self, earlier: Sequence[Turn], question: str, images: Tensor) -> tuple[list[int], dict[str, Tensor]]:
        ids = encode_next_prompt(self.tokenizer, earlier, question, len(images))
        length = len(ids) + len(images) * (self.patches - 1)
        if length > self.max_length:
            raise ValueError(f"it takes {length} positions, more than data.max_length = {self.max_length}")
        ids = self.expand(Encoded(ids, [IGNORE_INDEX] * len(ids))).input_ids
        return ids, self.answering_batch([], [images])

    def expand(self, encoded: Encoded) -> Encoded:
        return expand_images(encoded, self.image_token_id, self.patches, self.max_length)

    def _encode(self, record: TrainingRecord) -> Encoded:
        turns = filled_turns(record, self.box_rule)
        return self.expand(encode_conversation(self.tokenizer, turns, len(self.image_names(record))))
