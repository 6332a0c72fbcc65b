"""Image files as pictures that training reads: DICOM under a window, NIfTI slice by slice, others page by page."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.dicom import dicom_frames, is_dicom
from mslora_cr.data.sources.nifti import is_nifti, nifti_slices
from mslora_cr.data.sources.raster import raster_pictures
from mslora_cr.data.sources.rendering import Note, Rendering, as_png
from mslora_cr.data.sources.series import series_slices
from mslora_cr.utils.regular import check_regular


def pictures(
    path: Path, frame: int | None, rendering: Rendering, note: Note = lambda text: None
) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures of an image file, each with a suffix for its name (`.png`, `-f003.png`) and its bytes.

    DICOM, NIfTI, pages, more than 8 bits and rotated pictures become PNG; any other file of `images.FORMATS` stays as
    it is.

    Args:
        path: The file, or a folder with the slices of a DICOM series.
        frame: The frame, slice or page to take, from 0; None leaves it to `rendering`.
        note: Called with remarks on how the image was drawn.

    Raises:
        DataError: The file cannot be read, or has no such frame.
    """
    try:
        if path.is_dir():
            yield from as_png(series_slices(path, frame, rendering, note))
            return
        check_regular(path)
        if is_nifti(path):
            yield from as_png(nifti_slices(path, frame, rendering, note))
        elif is_dicom(path):
            yield from as_png(dicom_frames(path, frame, rendering, note))
        else:
            yield from raster_pictures(path, frame, rendering, note)
    except (DataError, ImportError):
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # One damaged file must not end the conversion of the others.
        raise DataError(f"{path}: cannot be shown ({type(error).__name__}: {error})") from None


def first_picture(content: bytes, rendering: Rendering) -> bytes:
    """Return the picture of an image file of any kind, drawn as by `pictures`; the middle frame of several.

    Raises:
        DataError: It cannot be read, or the library for it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(content)
        try:
            [(_, picture)] = pictures(path, None, Rendering(rendering.window, most_frames=1))
        except DataError as error:
            raise DataError(str(error).replace(str(path), f"an image of {len(content):,} bytes")) from None
        except ModuleNotFoundError as error:
            raise DataError(f"{error.name} is not installed; pip install 'mslora-cr[data]' installs it") from None
    return picture
