"""Measures how many positions samples take, without loading the model: from its tokenizer and number of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mslora_cr.data.images import tower_folder
from mslora_cr.data.prompts import (
    IGNORE_INDEX,
    IMAGE_INDEX,
    Turn,
    encode_conversation,
    encode_prompt,
    generation_prompt,
)
from mslora_cr.data.records import DataError, TrainingRecords, shown_images
from mslora_cr.data.tokenizer import Tokenizer
from mslora_cr.utils.strict_json import read_object

CLIP_PATCHES = 576
"""Of CLIP ViT-L/14 at 336 pixels, assumed where the model's own tower is not available."""


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


def count_cut(limit: Limit, records: TrainingRecords, all_images: bool) -> int:
    """How many samples end beyond the limit, where training cuts them.

    A text has no more pieces than its record has bytes in the file, so that only long records are encoded.

    Args:
        all_images: all images of a record are shown, not its first alone.

    Raises:
        DataError: a text of these cannot be encoded.
    """
    room = 0 if all_images else limit.max_length - limit.patches
    count = 0
    for index, size in enumerate(records.sizes()):
        if size > room:
            record = records[index]
            images = len(shown_images(record, all_images))
            try:
                count += training_length(limit, record.turns, images)[1] > limit.max_length
            except ValueError as error:
                raise DataError(f"{records.path}: {records.place(index)}: {error}") from None
    return count
