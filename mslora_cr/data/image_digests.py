"""Digests of image files: other images under the same names change what was asked or learned."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mslora_cr.data.records import sample_of
from mslora_cr.utils.files import file_digest


def image_file_digest(image: Path) -> str:
    """Return the SHA-256 of an image file, which is read again only if its size or modification time changed."""
    status = image.stat()
    return _digest(os.fspath(image), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 20)
def _digest(image: str, size: int, mtime_ns: int) -> str:
    """Cache digests in this process and in data loader workers forked from it; some hundred bytes per image."""
    return file_digest(Path(image))


def images_digest(images: Iterable[Path], most: int | None = None) -> str:
    """Return the SHA-256 over the sizes of some image files, in their order, and over their contents.

    Args:
        most: Read the contents of at most this many files, the same ones at every call.
    """
    files = list(images)
    sizes = [image.stat().st_size for image in files]
    read = range(len(files)) if most is None else sample_of(len(files), most)
    digest = hashlib.sha256(repr(sizes).encode())
    for position in read:
        digest.update(image_file_digest(files[position]).encode())
    return digest.hexdigest()
