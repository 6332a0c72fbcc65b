"""Draws NIfTI volumes, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.rendering import (
    Frame,
    Note,
    Pixels,
    Rendering,
    chosen_frames,
    in_colours,
    percentile_range,
    squared,
    stretched,
    windowed,
)

NIFTI = (".nii", ".nii.gz")
MAX_VOXELS = 1_000_000_000
"""A larger volume is refused: it takes 8 GB once it is scaled."""
MOST_COMPRESSED = 1032
"""The most bytes that a byte of a gzip file can expand to."""


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def nifti_slices(path: Path, frame: int | None, rendering: Rendering, note: Note) -> Iterator[Frame]:
    """Yield axial slices from the feet up, as radiologists see them: the patient's right on the left, front at the top.

    Args:
        frame: As in `chosen_frames`.
        rendering: A window that replaces the file's own range, and how many slices.
        note: Called with a remark if voxels are not square within a slice.

    Raises:
        DataError: The file cannot be read or drawn; the message names it and the reason.
    """
    values, spacing, bounds = _volume(path)
    colour = values.ndim == 4
    low, high = bounds or ((0.0, 255.0) if colour else percentile_range(values))
    for number in chosen_frames(values.shape[2], frame, rendering, path):
        cut = values[:, :, number].swapaxes(0, 1)[::-1, ::-1]
        if not colour:
            cut = np.nan_to_num(cut, nan=low, posinf=high, neginf=low)
        grey = stretched(cut, low, high) if colour else _drawn(cut, rendering, low, high)
        try:
            yield number, squared(grey, spacing[1], spacing[0], note)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def _drawn(cut: Pixels, rendering: Rendering, low: float, high: float) -> Pixels:
    if rendering.ct_windows:
        return in_colours(cut, rendering.ct_windows)
    if rendering.window:
        return windowed(cut, *rendering.window, "LINEAR_EXACT")
    return stretched(cut, low, high)


def _volume(path: Path) -> tuple[Pixels, tuple[float, float], tuple[float, float] | None]:
    """Return voxels (right, front, up), or (right, front, up, 3) in colour; their size; the file's own range if it has
    one.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        _check(path, image)
        image = nibabel.as_closest_canonical(image)
        values: Pixels = np.asarray(image.dataobj).reshape(image.shape[:3])
        zooms = image.header.get_zooms()
        low, high = (float(image.header[key]) for key in ("cal_min", "cal_max"))
    except DataError:
        raise
    except Exception as error:  # nibabel raises many kinds on damaged files
        raise DataError(f"{path}: not a NIfTI volume ({type(error).__name__}: {error})") from None
    if values.dtype.names:
        values = np.stack([values[name] for name in ("R", "G", "B")], -1)
    bounds = (low, high) if np.isfinite([low, high]).all() and high > low and values.ndim == 3 else None
    return values, (float(zooms[0]), float(zooms[1])), bounds


def _check(path: Path, image: Any) -> None:
    """Check the header before any voxel is read."""
    shape = image.shape
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise DataError(f"{path}: a volume of shape {shape}; expected three dimensions")
    voxels = int(np.prod(shape, dtype=np.int64))
    if not 0 < voxels <= MAX_VOXELS:
        raise DataError(f"{path}: a volume of {shape[:3]} has no voxel, or more than {MAX_VOXELS:,} voxels")
    kind = image.get_data_dtype()
    if kind.kind == "c":
        raise DataError(f"{path}: complex numbers cannot be drawn; save their magnitude or phase")
    if kind.names and not {"R", "G", "B"} <= set(kind.names):
        raise DataError(f"{path}: voxels of {', '.join(kind.names)}; expected numbers, or R, G and B")
    most = path.stat().st_size * (MOST_COMPRESSED if path.suffix.lower() == ".gz" else 1)
    if voxels * kind.itemsize > most:
        raise DataError(f"{path}: not a NIfTI volume (a file of this size cannot hold {shape} voxels)")
