"""DICOM files of a few pixels."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


def dicom(values: np.ndarray, stored: int = 16, interpretation: str = "MONOCHROME2", **tags) -> Dataset:
    """A file of values (rows, columns), (frames, rows, columns), or (rows, columns, 3) where `interpretation` is RGB."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    colour = interpretation == "RGB"
    data.Rows, data.Columns = values.shape[:2] if colour else values.shape[-2:]
    data.BitsAllocated = 8 * values.dtype.itemsize
    data.BitsStored = min(stored, data.BitsAllocated)
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.SamplesPerPixel = 3 if colour else 1
    if colour:
        data.PlanarConfiguration = 0
    elif values.ndim == 3:
        data.NumberOfFrames = len(values)
    data.PhotometricInterpretation = interpretation
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def item(**tags) -> Dataset:
    data = Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def saved(data: Dataset, path: Path) -> Path:
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path
