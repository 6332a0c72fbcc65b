"""Reads labels and PNG images from PatchCamelyon, which ships HDF5 arrays instead of images.

Image number i of a split is row i of `camelyonpatch_level_2_split_<split>_x.h5`; its label is in `…_y.h5`, its slide in
`…_meta.csv`.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.raw import Bounded, RawData, RawFile, extract, write_atomically

SLAB = 256
"""Number of rows read at a time."""


def image_name(split: str, index: int) -> str:
    """Return our name of row `index` of a split."""
    return f"{split}/{index:06d}.png"


def has_arrays(raw: RawData) -> bool:
    return any(file.path.name.startswith("camelyonpatch_level_2_split_") for file in raw.files)


def has_split(raw: RawData, split: str) -> bool:
    """Return whether both arrays of a split exist."""
    names = (f"camelyonpatch_level_2_split_{split}_{which}.h5" for which in "xy")
    return all(raw.has(name, f"{name}.gz") for name in names)


def read_labels(raw: RawData, split: str) -> list[bool]:
    """Return the label of each row: is there tumor tissue in the centre of the patch?"""
    with _array(raw, split, "y") as array:
        return [bool(label) for label in array[:].reshape(-1)]


def read_slides(raw: RawData, split: str, rows: int) -> list[str | None]:
    """Return the slide of each row; None for each where the table of the split is not there.

    Raises:
        DataError: The table has no column `wsi`, or not as many rows.
    """
    names = (f"camelyonpatch_level_2_split_{split}_meta.csv", f"camelyonpatch_level_2_split_{split}_meta.csv.gz")
    if not raw.has(*names):
        return [None] * rows
    path = _on_disk(raw, raw.find(*names))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            slides = [row.get("wsi") or None for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table ({error})") from error
    if len(slides) != rows or not any(slides):
        raise DataError(f"{path}: expected {rows} rows with the column wsi, found {sum(map(bool, slides))}")
    return slides


def export_images(raw: RawData, wanted: Mapping[str, Path], answers: Mapping[str, str], progress: bool) -> None:
    """Write the images `wanted` (name → target); the number at the end of a name is the row in the arrays.

    `answers` has what the annotations say about each image, in any two words. Nothing is written unless one word
    belongs to each label throughout: nothing else shows that the names count the rows.

    Raises:
        DataError: A name has no split or number, a number is out of range, or answers and labels do not match.
    """
    rows: dict[str, dict[int, Path]] = defaultdict(dict)
    for name, target in wanted.items():
        split, index = _row_of(name)
        rows[split][index] = target
    _check_answers(raw, answers)
    with tqdm(total=len(wanted), desc="PCam images", unit="image", disable=not progress) as bar:
        for split, targets in rows.items():
            with _array(raw, split, "x") as array, ThreadPoolExecutor() as pool:
                for chunk in _slabs(targets):
                    low, high = chunk[0], chunk[-1] + 1
                    patches = array[low:high]
                    list(pool.map(_write_png, (patches[i - low] for i in chunk), (targets[i] for i in chunk)))
                    bar.update(len(chunk))


def _check_answers(raw: RawData, answers: Mapping[str, str]) -> None:
    labels: dict[str, list[bool]] = {}
    counted: Counter[tuple[str, bool]] = Counter()
    for name, answer in answers.items():
        split, index = _row_of(name)
        if split not in labels:
            labels[split] = read_labels(raw, split)
        if index >= len(labels[split]):
            raise DataError(f"PCam image {name!r}: split {split} has {len(labels[split])} rows only")
        counted[answer.strip().strip(" .").lower(), labels[split][index]] += 1
    words = Counter(word for word, _ in counted.elements())
    if not len(words) == len(counted) == len({label for _, label in counted}) == 2:
        named = [word for word, _ in words.most_common(4)]
        counts = [f"{word[:60]!r} ({counted[word, True]} with, {counted[word, False]} without)" for word in named]
        more = f" and {len(words) - len(named)} other answers" if len(words) > len(named) else ""
        raise DataError(
            "PCam: expected two answers in the annotations, one for the rows with tumor tissue and one for those "
            f"without; found {', '.join(counts)}{more}. So the image names do not count the rows, or something else "
            "was asked: place the images by hand, or build the annotations with --annotations"
        )


def _row_of(name: str) -> tuple[str, int]:
    path = PurePosixPath(name)
    splits = [part for part in path.parts if part in ("train", "test", "valid")]
    number = re.search(r"(\d+)$", path.stem)
    if not splits or not number or len(number[1]) > 7:
        raise DataError(f"PCam image {name!r}: expected <split>/…<row number>.png")
    return splits[-1], int(number[1])


def _slabs(indices: Iterable[int]) -> Iterator[list[int]]:
    """Yield sorted indices in groups that lie within `SLAB` rows."""
    group: list[int] = []
    for index in sorted(indices):
        if group and index - group[0] >= SLAB:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _write_png(pixels: Any, target: Path) -> None:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    buffer.seek(0)
    write_atomically(target, buffer)


@contextmanager
def _array(raw: RawData, split: str, which: str) -> Iterator[Any]:
    """Open the dataset "x" (rows, 96, 96, 3) uint8 or "y" (rows, 1, 1, 1) uint8 of a split."""
    import h5py  # of the extra `data`

    name = f"camelyonpatch_level_2_split_{split}_{which}.h5"
    path = _on_disk(raw, raw.find(name, f"{name}.gz"))
    try:
        with h5py.File(path) as file:
            yield file[which]
    except (OSError, KeyError) as error:
        raise DataError(f"{path}: not PCam's HDF5 file ({error})") from error


def _on_disk(raw: RawData, file: RawFile) -> Path:
    """Return the file itself, unpacked (for as long as `raw` is open) where it is in an archive or gzipped."""
    path = file.container
    if file.member:
        path = raw.work / f"pcam-{file.path.name}"
        if not path.exists():
            extract({file: [path]})
    if path.suffix != ".gz":
        return path
    unpacked = raw.work / f"pcam-{path.stem.removeprefix('pcam-')}"
    if not unpacked.exists():
        try:
            with gzip.open(path) as stream:
                write_atomically(unpacked, Bounded(stream, path))
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: damaged ({error})") from error
    return unpacked
