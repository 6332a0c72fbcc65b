"""Labels without questions, as public sets have them: folders named by class, boxes in PASCAL-VOC's or COCO's form.

Folders become one question that names the classes. Boxes become two kinds of question about an image: whether a class
is there, for each class on the image and at most as many others (all, where the set has up to `FEW_CLASSES`), and how
many there are, for each class on it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mslora_cr.data.records import DataError
from mslora_cr.data.rows.arrow import split_in
from mslora_cr.data.rows.row import Problem, Row, UnusableError, said, split_of
from mslora_cr.utils.errors import shorten
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import JsonError, decode_json
from mslora_cr.utils.walk import files_below

ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".dcm", ".dicom")
FEW_CLASSES = 6
MOST_CLASSES = 100
"""The most folders: more are probably not classes but, say, patients."""
MOST_XML, MOST_COCO = 4 << 20, 512 << 20
CLASS_QUESTION = "Which of these does the image show: {classes}?"
PRESENCE_QUESTION = "Is there a {name} in the image?"
COUNT_QUESTION = "How many objects of the kind {name} are in the image?"


@dataclass(frozen=True)
class Boxed:
    """An image with the classes of its boxes, one entry per box."""

    location: str
    image: str
    split: str | None
    classes: Sequence[str]


def class_folders(folder: Path) -> dict[Path, str]:
    """Return the class of each image: the name of its folder; empty if images are not sorted by folders."""
    images = [path for path in files_below(folder) if path.suffix.lower() in ENDINGS and path.parent != folder]
    classes = {path: path.parent.name for path in images}
    names = set(classes.values())
    sides = {split_in(Path(name)) for name in names} - {None}
    return classes if 2 <= len(names) <= MOST_CLASSES and not sides else {}


def read_class_folders(folder: Path, question: str | None) -> Iterator[Row | Problem]:
    """Yield a question about each image, answered by its folder's name. A folder above may name the split."""
    classes = class_folders(folder)
    names = {name: name.replace("_", " ").strip().lower() for name in sorted(set(classes.values()))}
    asked = question or CLASS_QUESTION.format(classes=", ".join(names.values()))
    for path, name in classes.items():
        relative = path.relative_to(folder)
        above = relative.parent.parent
        turns = (("human", asked), ("gpt", names[name]))
        yield Row(str(relative), (relative.as_posix(),), turns, split_in(above), answer_type="CLOSED")
    for path in files_below(folder):
        if path not in classes:
            yield "a file that is no picture in a folder named by class", str(path.relative_to(folder))


def voc_files(folder: Path) -> list[Path]:
    """Return PASCAL-VOC's annotation files below a folder."""
    return [path for path in files_below(folder) if path.suffix == ".xml" and _is_annotation(path)]


def _is_annotation(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<annotation" in file.read(1_000)


def read_voc(folder: Path) -> Iterator[Row | Problem]:
    """Yield questions about the boxes of PASCAL-VOC files; `ImageSets/Main/*.txt` name the splits if there are any."""
    splits, images = _image_sets(folder), _by_stem(folder)
    boxed: list[Boxed] = []
    annotated: set[str] = set()
    for path in voc_files(folder):
        location = str(path.relative_to(folder))
        try:
            name, classes = _read_annotation(path)
        except (ElementTree.ParseError, UnusableError, LookupError, ValueError) as error:
            yield f"an annotation that cannot be read ({shorten(str(error))})", location
            continue
        matches = _nearest(Path(location), name, images.get(Path(name).stem) or images.get(path.stem, []))
        annotated |= {Path(name).stem, path.stem}
        if len(matches) == 1:
            split = splits.get(path.stem) or split_in(path.relative_to(folder))
            boxed.append(Boxed(location, matches[0].as_posix(), split, classes))
        else:
            yield f"{'several images' if matches else 'no image'} of the name that the annotation gives", location
    for stem in sorted(images.keys() - annotated):
        yield "an image without an annotation", images[stem][0].as_posix()
    yield from _asked(boxed)


def _read_annotation(path: Path) -> tuple[str, list[str]]:
    """Return the image's name and the classes of the boxes."""
    if path.stat().st_size > MOST_XML:
        raise UnusableError(f"larger than {MOST_XML >> 20} MB")
    text = check_regular(path).read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise UnusableError("it defines entities")
    root = ElementTree.fromstring(text)
    names = [(entry.findtext("name") or "").strip() for entry in root.iter("object")]
    return (root.findtext("filename") or path.stem).strip(), [name for name in names if name]


def _image_sets(folder: Path) -> dict[str, str]:
    """Return the split of the list that names each image, by the image's stem."""
    splits: dict[str, str] = {}
    for path in files_below(folder):
        if path.suffix == ".txt" and path.parent.parent.name == "ImageSets":
            try:
                split = split_of(path.stem)
            except UnusableError:  # trainval, or a class's own list
                continue
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            splits |= {line.split()[0]: split for line in lines if line.strip()}
    return splits


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    images = defaultdict(list)
    for path in files_below(folder):
        if path.suffix.lower() in ENDINGS:
            images[path.stem].append(path.relative_to(folder))
    return images


def _nearest(annotation: Path, name: str, images: Sequence[Path]) -> list[Path]:
    """Return the images that an annotation may mean: of its name with the ending if there are any, and of several those
    that share most folders with it."""
    named = [image for image in images if image.name == Path(name).name] or images
    shared = {image: len(commonpath([f"/{annotation}", f"/{image}"])) for image in named}
    return [image for image in named if shared[image] == max(shared.values())]


def is_coco(content: Any) -> bool:
    """Return whether a JSON object is COCO's list of boxes."""
    return isinstance(content, Mapping) and all(isinstance(content.get(key), list) for key in ("images", "annotations"))


def read_coco(path: Path) -> Iterator[Row | Problem]:
    """Yield questions about the boxes of a COCO file; its name may tell the split.

    Raises:
        DataError: It is no such file.
    """
    try:
        if check_regular(path).stat().st_size > MOST_COCO:
            raise DataError(f"{path}: larger than {MOST_COCO >> 20} MB")
        content = decode_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except JsonError as error:
        raise DataError(f"{path}: {error}") from None
    if not is_coco(content):
        raise DataError(f"{path}: expected a list of conversations or of questions, or COCO's boxes")
    names = dict(_pairs(content.get("categories"), "id", "name"))
    files = dict(_pairs(content["images"], "id", "file_name"))
    classes: dict[Any, list[str]] = {key: [] for key in files}
    for image, category in _pairs(content["annotations"], "image_id", "category_id"):
        if image in classes and category in names:
            classes[image].append(str(names[category]))
        else:
            yield "a box of an unknown image or category", f"{path.name}: image {shorten(image)}"
    split = split_in(Path(path.name))
    boxed = [
        Boxed(f"{path.name}: image {shorten(key)}", str(files[key]), split, labels) for key, labels in classes.items()
    ]
    yield from _asked(boxed)


def _pairs(items: Any, key: str, value: str) -> Iterator[tuple[Any, Any]]:
    for item in items if isinstance(items, list) else []:
        held = (item.get(key), item.get(value)) if isinstance(item, Mapping) else (None, None)
        if all(isinstance(part, str | int) for part in held):
            yield held


def _asked(boxed: Sequence[Boxed]) -> Iterator[Row]:
    """Yield the questions about each image, by the rule at the top of this file."""
    classes = sorted({name for image in boxed for name in image.classes})
    for image in boxed:
        counts = Counter(image.classes)
        absent = [name for name in classes if name not in counts]
        if len(classes) > FEW_CLASSES:  # in an order that depends on the image alone
            absent.sort(key=lambda name: hashlib.sha256(f"{image.image} {name}".encode()).digest())
            absent = absent[: max(len(counts), 1)]
        for name in sorted([*counts, *absent]):
            asked = PRESENCE_QUESTION.format(name=name)
            yield _row(image, asked, "yes" if name in counts else "no", "CLOSED")
            if name in counts:
                yield _row(image, COUNT_QUESTION.format(name=name), str(counts[name]), "OPEN")


def _row(image: Boxed, question: str, answer: str, answer_type: str) -> Row:
    turns = (("human", question), ("gpt", said(answer, "an answer")))
    return Row(image.location, (image.image,), turns, image.split, answer_type=answer_type)
