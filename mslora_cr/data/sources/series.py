"""Reads a folder of DICOM files that are the slices of one volume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.dicom import dicom_frames, is_dicom
from mslora_cr.data.sources.rendering import Frame, Note, Rendering, chosen_frames

if TYPE_CHECKING:
    from pydicom import Dataset

TAGS = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber", "NumberOfFrames")


def series_slices(folder: Path, frame: int | None, rendering: Rendering, note: Note) -> Iterator[Frame]:
    """Yield the slices of a series, each from a file of its own, in the order of their position.

    Args:
        folder: The folder of one series; other files in it are ignored.
        frame: As in `chosen_frames`.
        rendering: A window, and how many slices.
        note: Called with remarks on how files were drawn.

    Raises:
        DataError: There is no DICOM file, they belong to several series, or one has several frames or cannot be read.
    """
    files = _sorted_slices(folder)
    for number in chosen_frames(len(files), frame, rendering, folder):
        [(_, values)] = dicom_frames(files[number], None, replace(rendering, most_frames=1), note)
        yield number, values


def _sorted_slices(folder: Path) -> list[Path]:
    import pydicom

    headers: list[tuple[Path, Dataset]] = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_dicom(path):
            try:
                headers.append((path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))))
            except Exception as error:  # pydicom raises many kinds on damaged files
                raise DataError(f"{path}: not a DICOM image ({type(error).__name__}: {error})") from None
    if not headers:
        raise DataError(f"{folder}: no DICOM files in this folder; expected the slices of a series")
    series = {str(header.get("SeriesInstanceUID")) for _, header in headers}
    if len(series) > 1:
        raise DataError(f"{folder}: contains {len(series)} series; give each a folder of its own")
    several = next((path for path, header in headers if int(header.get("NumberOfFrames") or 1) > 1), None)
    if several:
        raise DataError(f"{several}: has several frames; name the file itself")
    return [path for _, _, path in sorted((*_slice_order(header), path) for path, header in headers)]


def _slice_order(header: Dataset) -> tuple[float, float]:
    """Return the position of a slice along the normal of its plane, in mm, and its number in the series."""
    position, orientation = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    number = float(header.get("InstanceNumber") or 0)
    if position is None or orientation is None or len(position) != 3 or len(orientation) != 6:
        return 0.0, number
    normal = np.cross([float(x) for x in orientation[:3]], [float(x) for x in orientation[3:]])
    return float(np.dot(normal, [float(x) for x in position])), number
