"""Measures how many positions samples take, and how much of them is learned, without loading the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mslora_cr.data.images import tower_folder
from mslora_cr.data.input_processor import InputProcessor, LabelCount
from mslora_cr.data.records import DataError, TrainingRecord
from mslora_cr.data.tokenizer import Tokenizer
from mslora_cr.utils.strict_json import read_object

if TYPE_CHECKING:
    from mslora_cr.data.datasets import Records

CLIP_PATCHES = 576
"""Patches of CLIP ViT-L/14 at 336 pixels, assumed where the model's own tower is not available."""


MOST_LOCATIONS = 3
"""A message names this many locations."""


@dataclass(frozen=True)
class Limit:
    """The greatest length of a LLaVA-Med sample, and the tools that measure lengths."""

    tokenizer: Tokenizer
    patches: int
    max_length: int


def read_limit(model: Path, max_length: int) -> Limit:
    """Load the tokenizer of LLaVA-Med's folder, and find how many patches its vision tower makes of an image.

    Raises:
        DataError: The folder holds no readable tokenizer or config.json.
    """
    try:
        config = read_object(model / "config.json")
        tower = config.get("vision_config")
        if tower is None:
            named = tower_folder(model, str(config.get("mm_vision_tower")))
            tower = read_object(named / "config.json") if named else {}
            tower = tower.get("vision_config", tower)
        patches = (tower["image_size"] // tower["patch_size"]) ** 2 if "patch_size" in tower else CLIP_PATCHES
        return Limit(Tokenizer(model), patches, max_length)
    except DataError:
        raise
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{model}: not a model's folder ({error})") from error


@dataclass
class LearnedCounts:
    """What training learns of a task's samples. Each list holds indices of records."""

    samples: int = 0
    unlabelled: list[int] = field(default_factory=list)
    """Records that the template cannot hold: they add nothing to the loss."""
    cut: list[int] = field(default_factory=list)
    """Records longer than `data.max_length` with some of the answer left."""
    lost: list[int] = field(default_factory=list)
    """Records that are cut before the first token of their answer."""
    empty: list[int] = field(default_factory=list)
    """Records without a word in any answer: their only labels are tokens that end an answer."""

    @property
    def learned(self) -> int:
        """Return how many samples have an answer to learn."""
        return self.samples - len(self.unlabelled) - len(self.lost) - len(self.empty)

    def add(self, index: int, record: TrainingRecord, count: LabelCount, max_length: int) -> None:
        """Count one record."""
        if not count.labels:
            self.unlabelled.append(index)
        elif not count.learned:
            self.lost.append(index)
        elif not any(turn.text.strip() for turn in record.turns if turn.speaker == "gpt"):
            self.empty.append(index)
        elif count.length > max_length:
            self.cut.append(index)


def count_learned(
    records: Records[TrainingRecord], roots: Sequence[Path], input_processor: InputProcessor, max_length: int
) -> LearnedCounts:
    """Count what training will learn of some records, without decoding an image.

    Args:
        max_length: `data.max_length`, in positions.

    Raises:
        DataError: A record cannot be encoded, or is cut through an image; the message says where.
    """
    counts = LearnedCounts(len(records))
    for index, record in enumerate(records):
        try:
            counts.add(index, record, input_processor.count_labels(record, roots), max_length)
        except ValueError as error:
            raise DataError(f"{records.path}: {records.location(index)}: {error}") from None
    return counts


def locations(records: Records[TrainingRecord], indices: Sequence[int]) -> str:
    """Name the first locations of some records, for a message."""
    more = f" and {len(indices) - MOST_LOCATIONS:,} more" if len(indices) > MOST_LOCATIONS else ""
    return ", ".join(records.location(index) for index in indices[:MOST_LOCATIONS]) + more
