"""Medical image files as PNG: DICOM under a window, NIfTI slice by slice, anything else as it is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mslora_cr.data.images import FORMATS, MAX_PIXELS, load_image
from mslora_cr.data.records import DataError
from mslora_cr.utils.regular import check_regular

if TYPE_CHECKING:
    from pydicom import Dataset

Pixels = NDArray[Any]
NIFTI = (".nii", ".nii.gz")
MAX_VOXELS = 1_000_000_000
"""A NIfTI volume of more is refused: 8 GB once it is scaled."""
EPSILON = 1e-9
PERCENTILES = (0.5, 99.5)
"""Between them a volume without a window is stretched; a few hot voxels would darken the rest."""


@dataclass(frozen=True)
class Rendering:
    """How volumes and DICOM files become pictures.

    Attributes:
        window: centre and width, in the units of the image (Hounsfield units in CT); None: the file's own.
        most_frames: of a file, evenly spaced; None: all.
    """

    window: tuple[float, float] | None = None
    most_frames: int | None = None


def pictures(path: Path, frame: int | None, rendering: Rendering) -> Iterator[tuple[str, bytes]]:
    """The pictures of an image file, each with a suffix for its name (`.png`, `-f003.png`) and its bytes.

    DICOM and NIfTI become PNG; a file of `images.FORMATS` stays as it is.

    Args:
        frame: of a file of several frames or slices, the one to take, from 0; None: as `rendering` says.

    Raises:
        DataError: the file cannot be read, or has no such frame.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if is_nifti(path):
        yield from _drawn(_nifti(path, frame, rendering))
    elif is_dicom(path):
        yield from _drawn(_dicom(path, frame, rendering))
    else:
        if frame is not None:
            raise DataError(f"{path}: has no frames or slices to choose from")
        load_image(path)
        with Image.open(path, formats=FORMATS) as image:
            suffix = f".{(image.format or 'png').lower()}"
        yield suffix, path.read_bytes()


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def is_dicom(path: Path) -> bool:
    """Whether a file is named as DICOM, or begins as one: files of a hospital's archive often have no ending."""
    if path.suffix.lower() in (".dcm", ".dicom"):
        return True
    try:
        with check_regular(path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def windowed(values: Pixels, center: float, width: float, function: str = "LINEAR") -> Pixels:
    """Values under a window, in [0, 1].

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, for the functions LINEAR, LINEAR_EXACT and SIGMOID.

    Args:
        values: any shape, in the units of the window. center, width: of the window.
    """
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / max(width, EPSILON)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / max(width, EPSILON) + 0.5, 0, 1)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _drawn(frames: Iterator[tuple[int | None, Pixels]]) -> Iterator[tuple[str, bytes]]:
    for number, values in frames:
        buffer = io.BytesIO()
        Image.fromarray(np.round(values * 255).astype(np.uint8)).save(buffer, "PNG")
        yield (".png" if number is None else f"-f{number:03d}.png"), buffer.getvalue()


def _chosen(count: int, frame: int | None, rendering: Rendering, path: Path) -> list[int]:
    """Which of a file's frames to take."""
    if frame is not None:
        if not 0 <= frame < count:
            raise DataError(f"{path}: has no frame {frame}; its {count} are counted from 0")
        return [frame]
    most = min(count, rendering.most_frames or count)
    return [int((index + 0.5) * count / most) for index in range(most)]


def _dicom(path: Path, frame: int | None, rendering: Rendering) -> Iterator[tuple[int | None, Pixels]]:
    import pydicom
    from pydicom.pixels import iter_pixels

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        rows, columns = int(header.Rows), int(header.Columns)
        count = int(header.get("NumberOfFrames") or 1)
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise DataError(f"{path}: not a DICOM image ({type(error).__name__}: {error})") from None
    if rows * columns > MAX_PIXELS:
        raise DataError(f"{path}: {columns} x {rows} is more than {MAX_PIXELS:,} pixels")
    numbers = _chosen(count, frame, rendering, path)
    try:
        for number, values in zip(numbers, iter_pixels(path, indices=numbers), strict=True):
            yield (number if count > 1 else None), _shown(header, values, rendering)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: its pixels cannot be read ({type(error).__name__}: {error})") from None


def _shown(header: Dataset, values: Pixels, rendering: Rendering) -> Pixels:
    """A frame as a screen shows it, in [0, 1]: (rows, columns), or (rows, columns, 3) in colour."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi

    interpretation = header.PhotometricInterpretation
    if interpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
    if values.ndim == 3:  # pydicom has made RGB of YBR
        return values / np.iinfo(values.dtype).max
    values = apply_modality_lut(values, header)
    if rendering.window:
        shown = windowed(values, *rendering.window)
    elif "VOILUTSequence" in header:
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        shown = np.clip(apply_voi(values, header) / (2**bits - 1), 0, 1)
    elif header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        # Several windows are alternatives; the first is the one to show.
        center, width = (np.atleast_1d(header[key].value)[0] for key in ("WindowCenter", "WindowWidth"))
        shown = windowed(values, float(center), float(width), header.get("VOILUTFunction", "LINEAR"))
    else:
        shown = _stretched(values, float(values.min()), float(values.max()))
    return 1 - shown if interpretation == "MONOCHROME1" else shown


def _stretched(values: Pixels, low: float, high: float) -> Pixels:
    return np.clip((values.astype(np.float64) - low) / max(high - low, EPSILON), 0, 1)


def _nifti(path: Path, frame: int | None, rendering: Rendering) -> Iterator[tuple[int | None, Pixels]]:
    """Axial slices from the feet up, as radiologists see them: the patient's right at the left, front at the top."""
    import nibabel

    try:
        image: Any = nibabel.load(path)
        shape = image.shape[:3] if len(image.shape) == 4 and image.shape[3] == 1 else image.shape
        if len(shape) != 3:
            raise DataError(f"{path}: a volume of shape {image.shape}; expected three dimensions")
        if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
            raise DataError(f"{path}: a volume of {shape} is more than {MAX_VOXELS:,} voxels")
        values: Pixels = np.asarray(nibabel.as_closest_canonical(image).dataobj)
        values = values.reshape(shape)
    except DataError:
        raise
    except Exception as error:  # nibabel raises many kinds on damaged files
        raise DataError(f"{path}: not a NIfTI volume ({type(error).__name__}: {error})") from None
    low, high = np.nanpercentile(values, PERCENTILES)
    for number in _chosen(values.shape[2], frame, rendering, path):
        cut = np.nan_to_num(values[:, ::-1, number].T[:, ::-1])
        shown = (
            windowed(cut, *rendering.window, "LINEAR_EXACT")
            if rendering.window
            else _stretched(cut, float(low), float(high))
        )
        yield number, shown
