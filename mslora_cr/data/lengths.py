"""Measures how many positions samples take, and how much of them is learned, without loading the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mslora_cr.data.images import tower_folder
from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.prompts import (
    IGNORE_INDEX,
    IMAGE_INDEX,
    Turn,
    encode_conversation,
    encode_prompt,
    generation_prompt,
)
from mslora_cr.data.records import DataError, TrainingRecords
from mslora_cr.data.tokenizer import Tokenizer
from mslora_cr.utils.strict_json import read_object

CLIP_PATCHES = 576
"""Of CLIP ViT-L/14 at 336 pixels, assumed where the model's own tower is not available."""


MOST_LOCATIONS = 3
"""How many places a message names."""


@dataclass(frozen=True)
class Limit:
    """How long a sample may be, and what its length is measured with."""

    tokenizer: Tokenizer
    patches: int
    max_length: int


def read_limit(model: Path, max_length: int) -> Limit:
    """The tokenizer of a model's folder, and how many patches its vision tower makes of an image.

    Raises:
        DataError: the folder holds no readable tokenizer or config.json.
    """
    try:
        config = read_object(model / "config.json")
        if config.get("model_type") != "llava_mistral" and (model / "processor_config.json").is_file():
            raise DataError(
                f"{model}: sample lengths are known only for LLaVA-Med; leave --model out, and training names the "
                "records that do not fit"
            )
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


def training_length(limit: Limit, turns: Sequence[Turn], images: int) -> tuple[bool, int]:
    """Whether a conversation bears labels, and its positions, image patches included, before it is cut."""
    ids, labels = encode_conversation(limit.tokenizer, turns, images)
    return any(label != IGNORE_INDEX for label in labels), _expanded(ids, limit)


def prompt_length(limit: Limit, question: str) -> int:
    """The positions of a question about one image, before it is cut."""
    return _expanded(encode_prompt(limit.tokenizer, generation_prompt(question)), limit)


def _expanded(ids: Sequence[int], limit: Limit) -> int:
    return len(ids) + ids.count(IMAGE_INDEX) * (limit.patches - 1)


@dataclass
class LearnedCounts:
    """Of a task's samples. Each list holds indices of records."""

    samples: int = 0
    unlabelled: list[int] = field(default_factory=list)
    """The template cannot hold them: they add nothing to the loss."""
    cut: list[int] = field(default_factory=list)
    """Longer than `data.max_length`, but some of the answer is left."""
    lost: list[int] = field(default_factory=list)
    """Cut before the first token of their answer."""

    @property
    def learned(self) -> int:
        """How many samples have a label to learn."""
        return self.samples - len(self.unlabelled) - len(self.lost)


def count_learned(
    records: TrainingRecords, roots: Sequence[Path], input_processor: InputProcessor, max_length: int
) -> LearnedCounts:
    """Count what training will learn of some records; no image is decoded.

    Args:
        records: of a task.
        roots: where its images are.
        input_processor: of the base model.
        max_length: `data.max_length`, in positions.

    Raises:
        DataError: a record cannot be encoded, or is cut through an image; says where.
    """
    counts = LearnedCounts(len(records))
    for index, record in enumerate(records):
        try:
            all_labels, learned, length = input_processor.count_labels(record, roots)
        except ValueError as error:
            raise DataError(f"{records.path}: {records.location(index)}: {error}") from None
        if not all_labels:
            counts.unlabelled.append(index)
        elif not learned:
            counts.lost.append(index)
        elif length > max_length:
            counts.cut.append(index)
    return counts


def locations(records: TrainingRecords, indices: Sequence[int]) -> str:
    """The first places of some records, for a message."""
    more = f" and {len(indices) - MOST_LOCATIONS:,} more" if len(indices) > MOST_LOCATIONS else ""
    return ", ".join(records.location(index) for index in indices[:MOST_LOCATIONS]) + more
