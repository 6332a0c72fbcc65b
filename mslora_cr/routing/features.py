"""Features of images and questions by which a router (`lda.py`, `learned.py`, `prototypes.py`) tells tasks apart.

They come from the frozen vision tower and the frozen word embeddings, so they are the same at every stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mslora_cr.data.datasets import Records
from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.prompts import question_text
from mslora_cr.data.records import DataError, TestRecord, TrainingRecord, sample_of
from mslora_cr.models.base_model import BaseModel, moved
from mslora_cr.utils.progress import progress_bar

FIT_RECORDS = 2000
"""The most records of a task that are used, a sample of its file: more would not move its mean or scatter."""
TEXT_FEATURES = 256
"""Wider word embeddings are projected to this many features, by the same random matrix every time, so that a task's
statistics stay small: Johnson and Lindenstrauss, 1984."""
IMAGE_FEATURES = 1024
"""The same for pictures: as many as LLaVA-Med's tower has."""
PROJECTION_SEED = 0
BATCH_SIZE = 32


class _FeatureDataset(Dataset[tuple[Any, list[int]]]):
    """Pictures and questions of some records, as inputs of the base model and as token ids."""

    def __init__(
        self,
        records: Records[TrainingRecord] | Records[TestRecord],
        indices: Sequence[int],
        roots: Sequence[Path],
        input_processor: InputProcessor,
    ) -> None:
        self.records, self.indices, self.roots, self.input_processor = records, indices, roots, input_processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, list[int]]:
        index = self.indices[position]
        record = self.records[index]
        text = _asked_first(record) if isinstance(record, TrainingRecord) else record.question
        try:
            images = self.input_processor.load_images(self.input_processor.image_names(record), self.roots)
        except ValueError as error:
            raise DataError(f"{self.records.path}: {self.records.location(index)}: {error}") from None
        return images, self.input_processor.tokenizer.encode(question_text(text, 0))


def _asked_first(record: TrainingRecord) -> str:
    """Return the first question of a conversation, which an answer may open; "" if there is none."""
    return next((turn.text for turn in record.turns if turn.speaker == "human"), "")


class FeatureExtractor:
    """Features of questions: the picture's, then the words', each part of length 1."""

    def __init__(
        self, base: BaseModel, input_processor: InputProcessor, device: torch.device, workers: int = 0
    ) -> None:
        """
        Args:
            base: The frozen base model. The part that reads pictures runs on `device`, wherever the rest is.
            workers: Processes that decode pictures.
        """
        self._input_processor, self._device, self._workers = input_processor, device, workers
        self._image_encoder = base.image_encoder
        self._words = base.model.get_input_embeddings().weight
        self._projection = _projection(self._words.shape[1], TEXT_FEATURES, PROJECTION_SEED)
        self._image_projection = _projection(self._image_encoder.width, IMAGE_FEATURES, PROJECTION_SEED + 1)

    @property
    def features(self) -> int:
        """The number of features."""
        return self.image_features + self._projection.shape[1]

    @property
    def image_features(self) -> int:
        """The number of image features, which come first."""
        return self._image_projection.shape[1]

    def gram(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the input of `statistics_of`, from batches of features; sums of parts of the records add up."""
        total = torch.zeros(self.features + 1, self.features + 1, dtype=torch.float64)
        for batch in batches:
            wide = torch.nn.functional.pad(batch.double(), (0, 1), value=1.0)
            total.addmm_(wide.T, wide)
        return total

    @torch.no_grad()
    def batches(
        self,
        records: Records[TrainingRecord] | Records[TestRecord],
        indices: Sequence[int],
        roots: Sequence[Path],
        label: str | None,
    ) -> Iterator[Tensor]:
        """Yield (up to BATCH_SIZE, features) float32 on the CPU, record after record.

        Args:
            label: The text of the progress bar; None shows no bar.

        Raises:
            DataError: An image is missing or broken.
        """
        looked = _FeatureDataset(records, indices, roots, self._input_processor)
        loader = DataLoader(looked, batch_size=BATCH_SIZE, collate_fn=list, num_workers=self._workers)
        with (
            moved(self._image_encoder.modules, self._device),
            progress_bar(desc=label, total=len(looked), unit="record", disable=label is None) as bar,
        ):
            for batch in loader:
                yield self._features(batch)
                bar.update(len(batch))

    @torch.no_grad()
    def of_question(self, images: Any, question: str) -> Tensor:
        """Return (1, features) of one question, as in `batches`.

        Args:
            images: Its images, as `InputProcessor.process_images` returns them.
        """
        with moved(self._image_encoder.modules, self._device):
            return self._features([(images, self._input_processor.tokenizer.encode(question_text(question, 0)))])

    def _features(self, batch: Sequence[tuple[Any, list[int]]]) -> Tensor:
        encoded = self._image_encoder.features([images for images, _ in batch], self._device)
        return torch.cat([torch.nn.functional.normalize(encoded @ self._image_projection), self._texts(batch)], dim=1)

    def _texts(self, batch: Sequence[tuple[Any, list[int]]]) -> Tensor:
        """Return the mean of the words' frozen embeddings; zeros for an empty question."""
        features = torch.zeros(len(batch), self._words.shape[1])
        for row, (_, ids) in enumerate(batch):
            if ids:
                features[row] = self._words[torch.tensor(ids, device=self._words.device)].float().mean(0).cpu()
        return torch.nn.functional.normalize(features @ self._projection)


def _projection(width: int, most: int, seed: int) -> Tensor:
    """Return a random projection (width, features) if there are more than `most`; otherwise None."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(width, most, generator=random) if width > most else torch.eye(width)


def sampled_records(records: int) -> list[int]:
    """Return the records of a task from which the router learns."""
    return sample_of(records, FIT_RECORDS)
