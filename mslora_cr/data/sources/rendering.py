"""Turns values into pictures: windows, ranges, square pixels, PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mslora_cr.data.images import MAX_PIXELS
from mslora_cr.data.records import DataError

Pixels = NDArray[Any]
Frame = tuple[int | None, Pixels]
"""The number of a frame, slice or page (None if the file has one), and its values in [0, 1]: (rows, columns), or (rows,
columns, 3) in colour."""
Note = Callable[[str], None]
"""Called with remarks on how a file was drawn."""
Window = tuple[float, float]
"""Centre and width."""

MAX_FRAMES = 100_000
"""A file with more frames is only read frame by frame (`#N`) or in part (`--frames`)."""
SQUARE = 0.02
"""Sides of a pixel that differ by no more than this share count as equal."""
EPSILON = 1e-9
PERCENTILES = (0.5, 99.5)
"""The percentiles over which values without a window are stretched; a few hot voxels would darken the rest."""
MEDGEMMA_WINDOWS: tuple[Window, ...] = ((-100, 2250), (40, 350), (40, 80))
"""MedGemma's protocol for CT: wide, soft tissue and brain as red, green and blue. Centre and width in Hounsfield units.
Source: a maintainer in issue 27 of google-health/medgemma."""
MEDGEMMA_FRAMES = 85
"""The most slices of a volume in that protocol."""
NOT_SQUARE = "its pixels are not square, so the picture is resized to equal spacing"


@dataclass(frozen=True)
class Rendering:
    """How volumes, DICOM files and images of more than 8 bits become pictures.

    Attributes:
        window: In the units of the image (Hounsfield units in CT); None takes the file's own.
        most_frames: The most frames of a file, evenly spaced; None takes all.
        ct_windows: Three windows that become red, green and blue, for computed tomography only.
    """

    window: Window | None = None
    most_frames: int | None = None
    ct_windows: tuple[Window, ...] = ()


def in_colours(values: Pixels, windows: Sequence[Window]) -> Pixels:
    """Return greys under three windows, as (rows, columns, 3) in [0, 1].

    Args:
        values: (rows, columns), in Hounsfield units.
        windows: The windows of red, green and blue.
    """
    return np.stack([windowed(values, *window, "LINEAR_EXACT") for window in windows], -1)


def windowed(values: Pixels, center: float, width: float, function: str = "LINEAR") -> Pixels:
    """Return values under a window, in [0, 1].

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, for the functions LINEAR, LINEAR_EXACT and SIGMOID.

    Args:
        values: Any shape, in the units of the window.
        function: The DICOM name of the VOI LUT function.
    """
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / max(width, EPSILON)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / max(width, EPSILON) + 0.5, 0, 1)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def stretched(values: Pixels, low: float, high: float) -> Pixels:
    """Return values in [0, 1], `low` black and `high` white."""
    return np.clip((values.astype(np.float64) - low) / max(high - low, EPSILON), 0, 1)


def percentile_range(values: Pixels) -> tuple[float, float]:
    """Return the finite values between which to stretch: `PERCENTILES`, or all values if these are equal."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, PERCENTILES)
    return (float(low), float(high)) if high > low else (float(finite.min()), float(finite.max()))


def chosen_frames(count: int, frame: int | None, rendering: Rendering, path: Path) -> Sequence[int]:
    """Return which of a file's frames to take.

    Args:
        count: The number of frames in the file.
        frame: The requested one, from 0; None leaves it to `rendering`.
        rendering: Has the most frames to take.
        path: Named in errors.

    Raises:
        DataError: There is no such frame, or there are more than `MAX_FRAMES` to draw.
    """
    if frame is not None:
        if not 0 <= frame < count:
            raise DataError(f"{path}: has no frame {frame}; its {count} are counted from 0")
        return [frame]
    most = min(count, rendering.most_frames or count)
    if most > MAX_FRAMES:
        raise DataError(f"{path}: has {count:,} frames, more than {MAX_FRAMES:,}; choose some with --frames or #N")
    return [int((index + 0.5) * count / most) for index in range(most)]


def squared(values: Pixels, vertical: float, horizontal: float, note: Note) -> Pixels:
    """Return values of a picture with square pixels: the axis of the longer side of a pixel is enlarged.

    Args:
        values: (rows, columns) or (rows, columns, 3), in [0, 1].
        vertical: The distance of rows, in any unit.
        horizontal: The distance of columns, in the same unit.
        note: Called with a remark on a resize.

    Raises:
        DataError: The picture would have more than `MAX_PIXELS` pixels.
    """
    usable = np.isfinite([vertical, horizontal]).all() and min(vertical, horizontal) > 0
    if not usable or abs(vertical / horizontal - 1) <= SQUARE:
        return values
    rows, columns = values.shape[:2]
    unit = min(vertical, horizontal)
    size = (round(columns * horizontal / unit), round(rows * vertical / unit))
    if max(size) ** 2 > MAX_PIXELS:
        raise DataError(
            f"pixels of {vertical:g} x {horizontal:g} make a picture of {size[0]} x {size[1]}, which is too large"
        )
    note(NOT_SQUARE)
    planes = [values] if values.ndim == 2 else [values[..., channel] for channel in range(values.shape[2])]
    resized = [
        np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
        for plane in planes
    ]
    return np.clip(resized[0] if values.ndim == 2 else np.stack(resized, -1), 0, 1)


def as_png(frames: Iterator[Frame]) -> Iterator[tuple[str, bytes]]:
    """Yield each frame as the suffix of its file's name (`.png`, `-f003.png`) and the bytes of an 8-bit PNG."""
    for number, values in frames:
        buffer = io.BytesIO()
        Image.fromarray(np.round(values * 255).astype(np.uint8)).save(buffer, "PNG")
        yield (".png" if number is None else f"-f{number:03d}.png"), buffer.getvalue()
