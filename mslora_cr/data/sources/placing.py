"""Draws the images of rows and writes them into a data set's folder, each once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mslora_cr.data.images import check_name
from mslora_cr.data.records import DataError
from mslora_cr.data.rows.row import Row
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.dicom import is_dicom
from mslora_cr.data.sources.rendering import Note, Rendering
from mslora_cr.utils.errors import shorten
from mslora_cr.utils.walk import files_below, find_file

IMAGES = "images"
MOST_DIGITS = 9
PSEUDONYM = "dicom-"
"""The prefix of a pseudonym: no name or number of a patient is copied from a header."""
_SAME = ({".jpg", ".jpeg"}, {".tif", ".tiff"})
"""Extensions that identify one format: such a file keeps its own."""


@dataclass
class ImagePlacer:
    """Writes images below a data set's folder and names them.

    Attributes:
        root: The folder that names start from.
        folder: The data set's folder.
        rendering: How images are drawn.
        note: Returns the function to call with remarks on how a file was drawn.
        count: The number of files written.
        patients: The pseudonym of each DICOM image's patient by the image's key, as far as the header names one.
    """

    root: Path
    folder: Path
    rendering: Rendering
    note: Callable[[Path], Note]
    count: int = 0
    patients: dict[str, str] = field(default_factory=dict)
    _names: dict[str, list[str]] = field(default_factory=dict)

    def place(self, row: Row) -> list[str]:
        """Return the names of a row's images below the data set's folder.

        Raises:
            DataError: One is missing or cannot be read.
        """
        return [name for image in row.images for name in self._placed(image)]

    def patient(self, row: Row) -> str | None:
        """Return the patient of the row's placed images, by the headers of DICOM files."""
        return next((self.patients[key] for key in map(_key, row.images) if key in self.patients), None)

    def _placed(self, image: str | bytes) -> list[str]:
        key = _key(image)
        if key not in self._names:
            self._names[key] = self._write_bytes(key, image) if isinstance(image, bytes) else self._write_file(image)
        return self._names[key]

    def _write_bytes(self, key: str, image: bytes) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / key
            path.write_bytes(image)
            self._note_patient(key, path)
            return self._write(path, None, key)

    def _write_file(self, name: str) -> list[str]:
        bare, mark, number = name.rpartition("#")
        frame = int(number) if mark and number.isascii() and number.isdecimal() and len(number) <= MOST_DIGITS else None
        relative = check_name(bare if frame is not None else name)
        path = find_file(self.root, relative)
        try:
            there = path.is_file() or path.is_dir()  # A folder is a series of DICOM files.
        except OSError as error:  # No file can have such a name.
            raise DataError(f"{shorten(str(path))}: no such image ({error.strerror})") from None
        if not there:
            raise DataError(f"{path}: no such image; --images DIR says where image names start")
        self._note_patient(
            name, next((file for file in files_below(path) if is_dicom(file)), path) if path.is_dir() else path
        )
        ends = path.is_file() and path.suffix != ".gz"
        return self._write(path, frame, str(relative.with_suffix("") if ends else relative))

    def _note_patient(self, key: str, path: Path) -> None:
        if is_dicom(path) and (patient := _patient(path)):
            self.patients[key] = patient

    def _write(self, path: Path, frame: int | None, stem: str) -> list[str]:
        """Write a file's pictures; `a/b.png` and `a/b.jpg` get different names."""
        names: list[str] = []
        written: list[Path] = []
        try:
            for suffix, data in pictures(path, frame, self.rendering, self.note(path)):
                ending = path.suffix if any({path.suffix.lower(), suffix} <= alike for alike in _SAME) else suffix
                name = f"{IMAGES}/{stem}{ending}"
                if (self.folder / name).exists():
                    name = f"{IMAGES}/{stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}{ending}"
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.write_bytes(data)
                    written.append(target)
                names.append(name)
        except DataError:  # No row shows the pages before one that cannot be read.
            for target in written:
                target.unlink()
            raise
        self.count += len(written)
        return names


def _key(image: str | bytes) -> str:
    """Return what tells an image from others: its name, or a digest of its bytes."""
    return image if isinstance(image, str) else hashlib.sha256(image).hexdigest()[:24]


def _patient(path: Path) -> str | None:
    """Return a pseudonym of a DICOM file's patient, or of the study if no patient is named; None if neither is."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "StudyInstanceUID"])
        named = [str(header.get(key) or "").strip() for key in ("PatientID", "StudyInstanceUID")]
    # pydicom raises many kinds of errors on damaged files, whose pixels are then refused with a reason.
    except Exception:
        return None
    identifier = next((f"{kind} {name}" for kind, name in zip(("patient", "study"), named, strict=True) if name), None)
    return f"{PSEUDONYM}{hashlib.sha256(identifier.encode(errors='replace')).hexdigest()[:12]}" if identifier else None
