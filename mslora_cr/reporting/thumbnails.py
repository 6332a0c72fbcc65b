"""Small versions of a stream's images, inside the page or, if there are many, in a folder beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from mslora_cr.data.images import load_image
from mslora_cr.data.records import DataError
from mslora_cr.utils.files import replacing
from mslora_cr.utils.workers import cores, worker_pool

SIDE = 144
"""Pixels of a thumbnail's longer side."""
MOST_INSIDE = 1000
"""The most pictures inside the page, at some 3 to 8 kB each."""
MOST_BYTES_INSIDE = 9_000_000
"""A page with its pictures stays below 15 MB: base64 adds a third."""
FOLDER = "report-images"
BATCH = 64


def thumbnails(pictures: Sequence[Path], page_folder: Path) -> tuple[dict[Path, str], list[str]]:
    """Return the image sources that a page in `page_folder` loads, and the pictures that could not be read.

    Up to `MOST_INSIDE` pictures become data URLs. More go to `report-images/` beside the page, under names made from
    the picture's path, size and modification time, so that the next report creates only new ones; other files there are
    removed.
    """
    if len(pictures) <= MOST_INSIDE:
        made = {path: small for path, small in zip(pictures, map(_small_or_none, pictures), strict=True) if small}
        if sum(map(len, made.values())) <= MOST_BYTES_INSIDE:
            sources = {
                path: f"data:image/webp;base64,{base64.b64encode(small).decode()}" for path, small in made.items()
            }
            return sources, _unread(pictures, sources)
    folder = page_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = {path: folder / _file_name(path) for path in pictures}
    todo = [(path, file) for path, file in files.items() if not file.is_file()]
    with worker_pool(cores()) as pool:
        list(pool.map(_write, [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]))
    for file in set(folder.glob("*.webp")) - set(files.values()):
        file.unlink()
    sources = {path: f"{FOLDER}/{file.name}" for path, file in files.items() if file.is_file()}
    return sources, _unread(pictures, sources)


def _unread(pictures: Iterable[Path], sources: dict[Path, str]) -> list[str]:
    return [str(path) for path in pictures if path not in sources]


def _write(todo: Sequence[tuple[Path, Path]]) -> None:
    for picture, file in todo:
        if (small := _small_or_none(picture)) is not None:
            with replacing(file) as partial:
                partial.write_bytes(small)


def _small_or_none(picture: Path) -> bytes | None:
    """Return the thumbnail as WebP; None if the picture cannot be read."""
    try:
        image = load_image(picture)
    except DataError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72)
    return buffer.getvalue()


def _file_name(picture: Path) -> str:
    status = picture.stat()
    text = f"{SIDE} {status.st_size} {status.st_mtime_ns} {picture.absolute()}"
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:24] + ".webp"
