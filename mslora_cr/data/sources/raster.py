"""Draws PNG, JPEG, TIFF and similar files as a viewer shows them: page by page, upright, opaque, in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mslora_cr.data.images import FORMATS, check_size, is_deep, load_image, page_count, see_through, turned
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.rendering import (
    MAX_FRAMES,
    Frame,
    Note,
    Pixels,
    Rendering,
    as_png,
    chosen_frames,
    percentile_range,
    stretched,
    windowed,
)

WHITE_IS_ZERO = 0
PHOTOMETRIC = 262
"""The TIFF tag that says which end of the range is black."""
SUFFIXES = {"MPO": "jpeg"}
"""Endings of formats that are not named like their files: a telephone's JPEG with a second picture is MPO to Pillow."""


def raster_pictures(path: Path, frame: int | None, rendering: Rendering, note: Note) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures of an image file: the file itself, or PNG where it has pages, transparent parts or over 8
    bits, or lies on its side.

    Args:
        path: A file in one of `images.FORMATS`.
        frame: The page, from 0; None takes all pages, or as many as `rendering` says.
        rendering: A window for images of more than 8 bits, and how many pages.
        note: Called with a remark on every image that changes.

    Raises:
        DataError: The file cannot be read, or has no such page.
    """
    if rendering.ct_windows:
        raise DataError(f"{path}: neither DICOM nor NIfTI; windows in Hounsfield units are only for CT")
    load_image(path)
    with Image.open(path, formats=FORMATS) as image:
        if page_count(image) > 1:
            yield from as_png(_pages(path, image, frame, rendering, note))
            return
        if frame is not None:
            raise DataError(f"{path}: has no frames or slices to choose from")
        if turned(image) or see_through(image) or _saturates(image, rendering):
            yield from as_png(iter([(None, _page(image, rendering, note))]))
        else:
            kind = image.format or "PNG"
            yield f".{SUFFIXES.get(kind, kind.lower())}", path.read_bytes()


def _pages(path: Path, image: Image.Image, frame: int | None, rendering: Rendering, note: Note) -> Iterator[Frame]:
    count = page_count(image)
    full = list(range(count)) if frame is not None else _full_pages(image, count)
    if len(full) < count:
        note("pages of another size than the first (previews, labels) are left out")
    several = len(full) > 1 or frame is not None
    for page in chosen_frames(len(full), frame, rendering, path):
        image.seek(full[page])
        check_size(image, str(path))
        yield (full[page] if several else None), _page(image, rendering, note)


def _full_pages(image: Image.Image, count: int) -> list[int]:
    """Return the pages that are as large as the first: a TIFF may contain previews and reduced copies of it."""
    if image.format != "TIFF" or count > MAX_FRAMES:
        return list(range(count))
    sizes = []
    for page in range(count):
        image.seek(page)
        sizes.append(image.size)
    return [page for page, size in enumerate(sizes) if size == sizes[0]]


def _saturates(image: Image.Image, rendering: Rendering) -> bool:
    """Return whether the conversion to 8 bits would lose information or leave a negative, or a window must be
    applied."""
    if not is_deep(image):
        return False
    values = np.asarray(image)
    fits = values.dtype.kind != "f" and values.min() >= 0 and values.max() <= 255
    return rendering.window is not None or not fits or _is_negative(image)


def _is_negative(image: Image.Image) -> bool:
    """Return whether 0 is white in an image of more than 8 bits, which Pillow leaves as it is."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]


def _page(image: Image.Image, rendering: Rendering, note: Note) -> Pixels:
    if turned(image):
        note("turned upright, as its EXIF orientation says")
    if is_deep(image):
        return _deep(image, rendering, note)
    upright = ImageOps.exif_transpose(image)
    if see_through(image):
        note("its transparent parts are drawn white")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return np.asarray(upright.convert("RGB")) / 255


def _deep(image: Image.Image, rendering: Rendering, note: Note) -> Pixels:
    """Return greys of more than 8 bits, under the window or between their percentiles."""
    negative = _is_negative(image)
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.float64)
    if rendering.window:
        grey = windowed(values, *rendering.window, "LINEAR_EXACT")
    else:
        note("more than 8 bits, stretched between percentiles; --window CENTER WIDTH sets a range")
        grey = stretched(np.nan_to_num(values), *percentile_range(values))
    return 1 - grey if negative else grey
