"""The digest that identifies a base model; it takes well under a second for 15 GB."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from mslora_cr.models.family import family_of
from mslora_cr.models.layout import CHAT_TEMPLATES, ModelError, indexed_files, read_config, shard_files
from mslora_cr.models.vision import tower_source

WHOLE_BYTES, END_BYTES, BLOCK_BYTES, BLOCKS = 64 << 20, 1 << 20, 64 << 10, 16
"""Sizes for `weights_digest`: files up to the first size are read whole; of larger ones, both ends and blocks between
them."""
_SETTINGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""The small files that decide how a model treats text and images."""


def weights_digest(path: Path, vision_tower: str = "config") -> str:
    """Return the digest that identifies a base model: a SHA-256 in hexadecimal.

    It covers the model's folder and that of the vision tower that `load` would take with this `vision_tower`:
    configurations, tokenizer and index in full; of the weights, every file's name and size, and all bytes of a file of
    up to 64 MB. Of a larger file it covers the safetensors header (each tensor's name, dtype, shape and offset), the
    first and the last MB, and 16 blocks of 64 KB, evenly spaced. Neither the folders' location nor other files in them
    matter.

    A change of size, dtype or sharding is noticed, and so is further training of all weights, even if they replace the
    old ones in place. Two changes go unnoticed: a large file that differs only outside the blocks (a few damaged bytes,
    or a few matrices that happen to lie between two blocks), and another revision of a tower on the hub, of which only
    the name counts. The digest does not protect against forgery.

    Raises:
        ModelError: A file is missing, or the configuration or an index is not one.
    """
    digest = hashlib.sha256()
    config = read_config(path)
    if family_of(path).own_template:
        _add_files(digest, [*_present(path, *_SETTINGS, *CHAT_TEMPLATES), *_transformers_files(path)])
        return digest.hexdigest()
    if config["model_type"] == "llava":
        _add_files(digest, [*_present(path, *_SETTINGS), *_transformers_files(path)])
        return digest.hexdigest()
    _add_files(digest, [*_present(path, *_SETTINGS, "model.safetensors.index.json"), *shard_files(path)])
    tower = tower_source(path, config, vision_tower)
    if not isinstance(tower, Path):
        digest.update(tower.encode())
        return digest.hexdigest()
    own_tower = vision_tower == "checkpoint"  # The folder still decides the preprocessing.
    _add_files(digest, [*_present(tower, *_SETTINGS), *([] if own_tower else _transformers_files(tower))])
    return digest.hexdigest()


def _present(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _transformers_files(folder: Path) -> list[Path]:
    """Return the files from which transformers loads a folder's weights, index included."""
    single = ("model.safetensors", "pytorch_model.bin")
    for file in _present(folder, *(f"{name}{ending}" for name in single for ending in ("", ".index.json"))):
        return [file, *indexed_files(file)] if file.suffix == ".json" else [file]
    raise ModelError(f"{folder}: contains no weights: neither {' nor '.join(single)}, nor an index of either")


def _add_files(digest: hashlib._Hash, files: Sequence[Path]) -> None:
    for file in files:
        try:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                for start, length in _digested_ranges(opened, size):
                    opened.seek(start)
                    digest.update(opened.read(length))
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from None


def _digested_ranges(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of a file that its digest covers."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    header = 8 + int.from_bytes(file.read(8), "little") if file.name.endswith(".safetensors") else 0
    head = max(END_BYTES, min(header, WHOLE_BYTES))  # No header is as long as that.
    offsets = [size * (number + 1) // (BLOCKS + 1) for number in range(BLOCKS)]
    return [(0, head), *((offset, BLOCK_BYTES) for offset in offsets), (size - END_BYTES, END_BYTES)]
