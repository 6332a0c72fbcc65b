"""Draws DICOM files as a viewer shows them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mslora_cr.data.advice import begins_as_dicom
from mslora_cr.data.images import MAX_PIXELS
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.rendering import (
    Frame,
    Note,
    Pixels,
    Rendering,
    chosen_frames,
    in_colours,
    squared,
    stretched,
    windowed,
)
from mslora_cr.utils.regular import check_regular

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_INFLATED = 1 << 30
"""The most bytes of a file in a deflated transfer syntax, once it is inflated."""
FUNCTIONAL_GROUPS = {
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope", "ModalityLUTSequence"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    "PixelMeasuresSequence": ("PixelSpacing",),
}
"""Where an enhanced file stores, for all frames or for each, what other files have at the top (PS3.3, C.7.6.16)."""
REPLACED = {"PixelValueTransformationSequence": "ModalityLUTSequence", "FrameVOILUTSequence": "VOILUTSequence"}
"""The table at the top that a functional group replaces."""
PADDING = ("Pixel", "FloatPixel", "DoubleFloatPixel")
"""Prefixes of the names of padding values, by the type of the pixels."""
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""Vertical and horizontal size of a pixel; the first that a file has counts."""


def is_dicom(path: Path) -> bool:
    """Return whether a file is named as DICOM, or begins like one: files of a hospital's archive often have no
    extension.
    """
    try:
        return path.suffix.lower() in (".dcm", ".dicom") or begins_as_dicom(check_regular(path))
    except OSError:
        return False


def dicom_frames(path: Path, frame: int | None, rendering: Rendering, note: Note) -> Iterator[Frame]:
    """Yield the frames of a DICOM file.

    Args:
        frame: As in `chosen_frames`.
        rendering: A window that replaces the file's own, and how many frames.
        note: Called with a remark if pixels are not square.

    Raises:
        DataError: The file cannot be read or shown, with its name and the reason.
    """
    import pydicom
    from pydicom.pixels import iter_pixels

    header = _header(path)
    count = int(header.get("NumberOfFrames") or 1)
    numbers = chosen_frames(count, frame, rendering, path)
    try:
        source = pydicom.dcmread(path) if _is_deflated(path) else path  # pydicom inflates only whole files.
        decoded = iter_pixels(source, indices=list(numbers), correct_unused_bits=False)
        for number, values in zip(numbers, decoded, strict=True):
            of_frame = _of_frame(header, number)
            yield (
                (number if count > 1 else None),
                squared(_to_display(of_frame, values, rendering), *_spacing(of_frame), note),
            )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise DataError(f"{path}: its pixels cannot be read ({type(error).__name__}: {error})") from None


def _header(path: Path) -> Dataset:
    """Read everything except the pixels, after a check that the file can contain as many as it claims."""
    import pydicom

    try:
        size = _size(path)
        header = pydicom.dcmread(path, stop_before_pixels=True)
        rows, columns = int(header.Rows), int(header.Columns)
        count = int(header.get("NumberOfFrames") or 1)
        encapsulated = header.file_meta.TransferSyntaxUID.is_encapsulated
        # A native frame may have two samples although the header says three (YBR_FULL_422); an item takes 8 bytes.
        bits = int(header.BitsAllocated) * int(header.SamplesPerPixel) * rows * columns
    except DataError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise DataError(f"{path}: not a DICOM image ({type(error).__name__}: {error})") from None
    if rows * columns > MAX_PIXELS:
        raise DataError(f"{path}: {columns} x {rows} is more than {MAX_PIXELS:,} pixels")
    if count > 1 and count * (64 if encapsulated else bits // 2) > 8 * size:
        raise DataError(f"{path}: says that it has {count:,} frames, for which its {size:,} bytes are too few")
    return header


def _is_deflated(path: Path) -> bool:
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    try:
        return read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
    except Exception:  # Without meta information, the file is read as it is, or refused.
        return False


def _size(path: Path) -> int:
    """Return the bytes of a file, inflated where its transfer syntax is deflated."""
    from pydicom.filereader import read_file_meta_info

    if not _is_deflated(path):
        return path.stat().st_size
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        # 128 bytes of preamble, the mark of 4, and the element of 12 that says how long the meta information is
        file.seek(128 + 4 + 12 + int(read_file_meta_info(path).FileMetaInformationGroupLength))
        data = file.read(1 << 20)
        while data and not inflate.eof:
            size += len(inflate.decompress(data, 1 << 22))
            if size > MAX_INFLATED:
                raise DataError(f"{path}: more than {MAX_INFLATED:,} bytes once it is inflated")
            data = inflate.unconsumed_tail or file.read(1 << 20)
    return size


def _of_frame(header: Dataset, number: int) -> Dataset:
    """Return the header with one frame's functional groups at the top: its own before the shared ones."""
    from pydicom import Dataset

    shared, per_frame = header.get("SharedFunctionalGroupsSequence"), header.get("PerFrameFunctionalGroupsSequence")
    groups = [*(shared or [])[:1], *(per_frame or [])[number : number + 1]]
    if not groups:
        return header
    merged = Dataset()  # A copy by `copy` would share its elements.
    merged.update(header)
    merged.set_original_encoding(*header.original_encoding)
    for group in groups:
        for name, keys in FUNCTIONAL_GROUPS.items():
            for item in (group.get(name) or [])[:1]:
                if name in REPLACED and REPLACED[name] in merged:
                    delattr(merged, REPLACED[name])
                for key in keys:
                    if key in item:
                        merged.add(item[key])  # Setting a value would change the header's own element.
    return merged


def _spacing(header: Dataset) -> tuple[float, float]:
    """Return the vertical and horizontal size of a pixel; (1, 1) if the file does not say, or says 0."""
    for key in SPACINGS:
        value = header.get(key)
        if value is not None and len(value) == 2 and min(map(float, value)) > 0:
            return float(value[0]), float(value[1])
    return 1.0, 1.0


def _to_display(header: Dataset, values: Pixels, rendering: Rendering) -> Pixels:
    """Return a frame as a screen shows it, in [0, 1]: (rows, columns), or (rows, columns, 3) in colour."""
    interpretation = header.PhotometricInterpretation
    if rendering.ct_windows:
        return _tomogram(header, values, rendering)
    if interpretation == "PALETTE COLOR":
        return _palette(header, _stored(header, values)[0])
    if values.ndim == 3:
        return _colour(header, values)
    stored, padding = _stored(header, values)
    grey = _grey(header, stored, padding, rendering)
    grey = 1 - grey if interpretation == "MONOCHROME1" else grey
    grey = np.where(padding, 0.0, grey)
    if header.get("PixelPresentation") in ("COLOR", "MIXED") and "RedPaletteColorLookupTableDescriptor" in header:
        # Supplemental palette, PS3.3, C.7.6.19: values from the first mapped one on have colours, the others are grey.
        coloured = stored >= int(header.RedPaletteColorLookupTableDescriptor[1])
        return np.where(coloured[..., None], _palette(header, stored), grey[..., None])
    return grey


def _tomogram(header: Dataset, values: Pixels, rendering: Rendering) -> Pixels:
    """Return a CT frame under three windows, with padding drawn like air: black."""
    if header.get("Modality") != "CT" or values.ndim != 2:
        raise DataError(f"its modality is {header.get('Modality')!r}; windows in Hounsfield units are only for CT")
    stored, padding = _stored(header, values)
    colours = in_colours(_rescaled(header, stored), rendering.ct_windows)
    return np.where(padding[..., None], 0.0, colours)


def _wrapped(values: Pixels, bits: int, signed: bool) -> Pixels:
    """Return integers of which `bits` bits are kept, read with or without a sign."""
    stored_bits = values.astype(np.int64) & ((1 << bits) - 1)
    return stored_bits - ((stored_bits >> (bits - 1)) << bits) if signed else stored_bits


def _stored(header: Dataset, values: Pixels) -> tuple[Pixels, Pixels]:
    """Return the stored values without the bits above or below them (overlays of old files), and where padding is.

    Padding: PS3.3, C.7.5.1.1.2. A padding value that does not fit into the stored bits is that of the whole cell.

    Args:
        header: The frame's header.
        values: (rows, columns), whole cells of `BitsAllocated` bits, or floating point.
    """
    limits = [header.get(f"{kind}{key}") for kind in PADDING for key in ("PaddingValue", "PaddingRangeLimit")]
    bounds = np.array([limit for limit in limits if limit is not None])
    if values.dtype.kind == "f":
        return values, _between(values, bounds) | ~np.isfinite(values)
    cell_bits, signed = 8 * values.dtype.itemsize, bool(header.get("PixelRepresentation"))
    bits = min(int(header.get("BitsStored") or cell_bits), cell_bits)
    below = int(header.get("HighBit", bits - 1)) + 1 - bits
    below = below if 0 < below <= cell_bits - bits else 0
    stored = _wrapped(values.astype(np.int64) >> below, bits, signed)
    in_cell = _wrapped(bounds, cell_bits, signed)
    if (in_cell == _wrapped(bounds, bits, signed)).all():
        return stored, _between(stored, in_cell)
    return stored, _between(_wrapped(values, cell_bits, signed), in_cell)


def _between(values: Pixels, bounds: Pixels) -> Pixels:
    if not bounds.size:
        return np.zeros(values.shape, dtype=bool)
    return (values >= bounds.min()) & (values <= bounds.max())


def _rescaled(header: Dataset, stored: Pixels) -> Pixels:
    """Return stored values in the units of the modality. Slope and intercept may each be missing."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, header)
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope is None and intercept is None:
        return stored
    return stored * float(1 if slope is None else slope) + float(intercept or 0)


def _grey(header: Dataset, stored: Pixels, padding: Pixels, rendering: Rendering) -> Pixels:
    """Return stored values, rescaled and under a window or table; otherwise stretched over their range without the
    padding.
    """
    from pydicom.pixels import apply_voi

    values = _rescaled(header, stored)
    if rendering.window:
        return windowed(values, *rendering.window)
    if header.get("VOILUTSequence"):
        windowed_values = apply_voi(values, header)
        # Entries may have more bits than the descriptor says.
        bits = max(int(header.VOILUTSequence[0].LUTDescriptor[2]), int(windowed_values.max()).bit_length())
        return windowed_values / (2**bits - 1)
    if window := _window(header):
        return windowed(values, *window, header.get("VOILUTFunction") or "LINEAR")
    inside = values[~padding]
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 1.0)
    return stretched(values, low, high)


def _window(header: Dataset) -> tuple[float, float] | None:
    """Return the file's first window that has a width; further ones are alternatives."""
    settings = [
        np.atleast_1d(header[key].value).astype(float)
        for key in ("WindowCenter", "WindowWidth")
        if header.get(key) is not None
    ]
    if len(settings) != 2:
        return None
    return next(((float(center), float(width)) for center, width in zip(*settings, strict=False) if width > 0), None)


def _colour(header: Dataset, values: Pixels) -> Pixels:
    """Return RGB, which pydicom has made of YBR, as a share of what the stored bits can hold."""
    if values.shape[2] != 3 or not str(header.PhotometricInterpretation).startswith(("RGB", "YBR")):
        kind = header.PhotometricInterpretation
        raise DataError(f"it has {values.shape[2]} samples a pixel, as {kind}; expected 1, or 3 of RGB or YBR")
    bits = min(int(header.get("BitsStored") or 8 * values.dtype.itemsize), 8 * values.dtype.itemsize)
    return np.clip(values / (2**bits - 1), 0, 1)


def _palette(header: Dataset, stored: Pixels) -> Pixels:
    """Return the colours of a palette. 8 bits may be stored in 16 with an empty high byte: PS3.3, C.7.6.3.1.5."""
    entries = int(header.RedPaletteColorLookupTableDescriptor[0]) or 1 << 16
    first = int(header.RedPaletteColorLookupTableDescriptor[1])
    table = np.stack([_channel(header, colour, entries) for colour in ("Red", "Green", "Blue")], -1)
    most = 255 if table.max() <= 255 else 65535
    return table[np.clip(stored - first, 0, entries - 1)] / most


def _channel(header: Dataset, colour: str, entries: int) -> Pixels:
    """Return one colour's entries, in a type that holds them."""
    from pydicom.pixels import apply_color_lut

    data = header.get(f"{colour}PaletteColorLookupTableData")
    if data is None:  # segments, which pydicom expands
        first = int(header.RedPaletteColorLookupTableDescriptor[1])
        return apply_color_lut(np.arange(first, first + entries), header)[..., ("Red", "Green", "Blue").index(colour)]
    little = header.original_encoding[1] is not False
    kind = np.dtype("u1") if len(data) < 2 * entries else np.dtype("<u2" if little else ">u2")
    return np.frombuffer(data, kind)[:entries].astype(np.uint16)
