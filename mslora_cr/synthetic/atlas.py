"""Real pictures for pretraining, of public sets that no stream of this package uses, and what is seen in them.

Brain MR in four classes, smears of red blood cells with the code of each cell, and fundus photographs. The plain words
for them are those of someone who sees shapes and knows no medicine, as in `pretraining.py`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mslora_cr.data.images import preprocess
from mslora_cr.data.sources.raw import RawData, RawFile, fingerprint, read
from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.synthetic.images import Traits
from mslora_cr.synthetic.pretraining import Seen
from mslora_cr.utils.errors import DataError
from mslora_cr.utils.progress import progress_bar

REPOSITORIES = {
    "MR": "arsalannkhann/Brain-Tumor-Detection",
    "smear": "Chula-PIC-Lab/Chula-RBC-12-Dataset",
    "fundus": "hamdan92/retinal-vessel-segmentation",
}
"""On github.com, by kind of picture."""
_FILES = {
    "MR": r"Dataset/train/(glioma|meningioma|notumor|pituitary)/[^/]+\.png",
    "smear": r"Dataset/(\d+)\.jpg",
    "fundus": r"DRIVE/(?:training|test)/images/()[^/]+\.tif",
}
_WORDS = {
    "lump": {
        "glioma": "wide lump",
        "meningioma": "lump on the border",
        "notumor": "no lump",
        "pituitary": "lump in the middle",
    },
    "number": {"few": "few discs", "some": "some discs", "many": "many discs", "crowd": "a crowd of discs"},
    "shapes": {
        "plain": "all discs alike",
        "1": "large discs",
        "2": "tiny discs",
        "3": "solid balls",
        "4": "rings with a dot",
        "5": "discs with a slit",
        "6": "eggs",
        "7": "drops",
        "8": "discs with spikes",
        "9": "splinters",
        "11": "pale discs",
        "12": "rods",
    },
    "light": {"low": "dark", "middle": "half dark", "high": "bright"},
    "texture": {"low": "smooth", "middle": "grainy", "high": "rough"},
    "colour": {"grey": "grey", "red": "red", "blue": "violet"},
}
_NOUNS = {
    "lump": ("brain",),
    "number": ("How many", "number"),
    "shapes": ("cell", "cells"),
    "light": ("light",),
    "texture": ("pattern",),
    "colour": ("stain",),
}
_UPPER = (4, 12, 24)
"""The most cells that are few, some, and many: quarters of a smear and whole ones lie in all four."""
COLOURED = 0.03
"""The mean difference of red and blue from which a picture is not grey."""
_LOOKS = ("light", "texture", "colour")
CLASSES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "MR": {trait: tuple(_WORDS[trait]) for trait in ("lump", *_LOOKS)},
    "smear": {trait: tuple(_WORDS[trait]) for trait in ("number", "shapes", *_LOOKS)},
    "fundus": {trait: tuple(_WORDS[trait]) for trait in _LOOKS},
}
"""The traits of each kind of picture, and their values."""


class AtlasFile(NamedTuple):
    """A picture, and where the raw download has it and its cells.

    Attributes:
        kind: `MR`, `smear` or `fundus`.
        label: The class of an MR picture; the number of a smear.
        file: The picture.
        cells: The smear's labels; None of other kinds.
    """

    kind: str
    label: str
    file: RawFile
    cells: RawFile | None


def atlas_files(raw: RawData) -> list[AtlasFile]:
    """Return the pictures of all three sets in a raw download, sorted by kind and path.

    Raises:
        DataError: A set is not there; the message names its repository.
    """
    cells = {match[1]: file for match, file in _fitting(raw, r"Label/(\d+)\.txt")}
    files: list[AtlasFile] = []
    for kind, pattern in _FILES.items():
        of_kind = [AtlasFile(kind, match[1], file, cells.get(match[1])) for match, file in _fitting(raw, pattern)]
        if not of_kind:
            where = f"github.com/{REPOSITORIES[kind]}"
            raise DataError(f"no {kind} pictures in the raw download, as {where} has them; clone it")
        files += [one for one in of_kind if one.cells or kind != "smear"]
    return files


def _fitting(raw: RawData, pattern: str) -> list[tuple[re.Match[str], RawFile]]:
    """Return the files whose path ends like that, sorted by path."""
    compiled = re.compile(rf"(?:^|/){pattern}$")
    pairs = [(match, file) for file in raw.files if (match := compiled.search(str(file.path)))]
    return sorted(pairs, key=lambda pair: str(pair[1].path))


def atlas_texts() -> Iterator[str]:
    """Return every description of one trait, for the tokenizer to spell well."""
    for values in _WORDS.values():
        yield from values.values()


def atlas_digest(files: Sequence[AtlasFile]) -> str:
    """Return the SHA-256 of the labels, sizes and checksums of the pictures."""
    lines = (f"{one.kind} {one.label} {fingerprint(one.file)}\n" for one in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def atlas_album(base: LlavaMed, files: Sequence[AtlasFile], progress: bool) -> tuple[Tensor, list[Seen]]:
    """Return the pictures as the tower reads them, (pictures, 3, height, width) float32, and what is seen in each.

    Smears and fundus photographs are there whole and as four quarters.

    Raises:
        DataError: A picture or a label cannot be read.
    """
    pixels: list[Tensor] = []
    labelled: list[tuple[str, Traits]] = []
    for one in progress_bar(files, desc="real pictures", unit="image", disable=not progress):
        for picture, traits in _views(one):
            pixels.append(preprocess(picture, base.image_processor))
            labelled.append((one.kind, traits))
    album = torch.stack(pixels)
    processor = base.image_processor
    scale, middle = (torch.tensor(values)[:, None, None] for values in (processor.image_std, processor.image_mean))
    looks = _looks(album * scale + middle, [kind for kind, _ in labelled])
    seen = [_seen(kind, {**traits, **look}) for (kind, traits), look in zip(labelled, looks, strict=True)]
    return album, seen


def _views(one: AtlasFile) -> Iterator[tuple[Image.Image, Traits]]:
    try:
        with Image.open(io.BytesIO(read(one.file))) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{one.file.path}: not a readable picture ({error})") from None
    width, height = picture.size
    if one.kind == "MR":
        yield picture, {"lump": one.label}
        return
    halves = [(0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2)]
    quarters = [(left, top, left + width // 2, top + height // 2) for left, top in halves]
    cells = _cells(one.cells) if one.cells else []
    for box in ((0, 0, width, height), *quarters):
        inside = [code for x, y, code in cells if box[0] <= x < box[2] and box[1] <= y < box[3]]
        yield picture.crop(box), _smear(inside) if one.cells else {}


def _cells(file: RawFile) -> list[tuple[float, float, str]]:
    """Return the place and the code of each cell: lines of `x y code`."""
    try:
        rows = [line.split() for line in read(file).decode("ascii").splitlines() if line.strip()]
        return [(float(x), float(y), str(int(code))) for x, y, code in rows]
    except ValueError as error:
        raise DataError(f"{file.path}: expected lines of x, y and a code ({error})") from None


def _smear(codes: Sequence[str]) -> Traits:
    number = list(_WORDS["number"])[sum(len(codes) > most for most in _UPPER)]
    odd = Counter(code for code in codes if code in _WORDS["shapes"])
    return {"number": number, "shapes": odd.most_common(1)[0][0] if odd else "plain"}


def _looks(album: Tensor, kinds: Sequence[str]) -> list[Traits]:
    """Return how light, how rough and of which colour each picture is, the first two by thirds of its kind, from
    (pictures, 3, height, width) between 0 and 1."""
    grey = album.mean(1)
    light = grey.mean((1, 2))
    texture = grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))
    red = (album[:, 0] - album[:, 2]).mean((1, 2))
    thirds: dict[str, list[str]] = {}
    for name, values in (("light", light), ("texture", texture)):
        thirds[name] = [""] * len(kinds)
        for kind in set(kinds):
            indices = [index for index, other in enumerate(kinds) if other == kind]
            bounds = torch.quantile(values[indices], torch.tensor([1 / 3, 2 / 3]))
            for index in indices:
                thirds[name][index] = ("low", "middle", "high")[int((values[index] > bounds).sum())]
    colours = ["red" if value > COLOURED else "blue" if value < -COLOURED else "grey" for value in red.tolist()]
    return [
        {"light": light, "texture": texture, "colour": colour}
        for light, texture, colour in zip(thirds["light"], thirds["texture"], colours, strict=True)
    ]


def _seen(kind: str, traits: Traits) -> Seen:
    return Seen(kind, traits, {trait: _WORDS[trait][value] for trait, value in traits.items()}, _NOUNS)
