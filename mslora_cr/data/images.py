"""Images of a task: finds them below the data root, decodes them, and makes the tower's pixels."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import chain, islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mslora_cr.data.advice import DICOM, begins_as_dicom
from mslora_cr.data.records import DataError
from mslora_cr.utils.files import append_to
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.walk import find_file
from mslora_cr.utils.workers import worker_pool

if TYPE_CHECKING:  # torch is slow to import, and processes that only check images never need it.
    import torch

MAX_PIXELS = 80_000_000
"""The most pixels of the square to which an image is padded, 240 MB in RGB; larger ones count as decompression
bombs."""
# Raster formats only: Pillow would pass some of the others (EPS) to an external program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")

PAGED = ("TIFF", "GIF", "WEBP", "PNG")
"""Formats whose files may hold several pictures."""
ORIENTATION = 0x0112
"""The EXIF tag."""

_CHUNK = 32  # The number of images that a worker checks between two reports.
_MARK_BYTES = 16


class MissingImageError(DataError):
    """No root has a file of an image's name."""


def image_roots(data_root: Path, folder: str, image_folders: Sequence[str] = ()) -> list[Path]:
    """Return folders in which the image names of a task's annotations may start: its folder, the data root, its image
    folders.
    """
    task = data_root / folder
    return [task, data_root, *(task / name for name in image_folders)]


def tower_folder(model: Path, name: str) -> Path | None:
    """Return the folder of the vision tower that a model's configuration calls `name`, unless it is only on the hub.

    It is a folder inside the model's, beside it (`pretrained_models/openai/…` beside
    `pretrained_models/llava_med_v1.5`), below the working directory, or an absolute one.
    """
    return next((folder for folder in (model / name, model.parent / name, Path(name)) if folder.is_dir()), None)


def check_name(name: str) -> PurePosixPath:
    """Return `name` as a relative path that stays below whatever it is joined to.

    Raises:
        DataError: It is empty, absolute, climbs with `..`, contains a backslash, a drive or a NUL character, or has a
            part longer than file systems allow.
    """
    path = PurePosixPath(name)
    safe = path.parts and not path.is_absolute() and ".." not in path.parts and not PureWindowsPath(name).drive
    if not safe or "\\" in name or "\0" in name or max(len(os.fsencode(part)) for part in path.parts) > 255:
        raise DataError(f"image {name!r}: expected a relative path below the data root, with '/' and no '..'")
    return path


def resolve_image(name: str, roots: Sequence[Path]) -> Path:
    """Return the first existing `root/name`; if there is none, the first whose name is the same in another Unicode
    form.

    Folders that the user linked into a root are followed.

    Raises:
        DataError: The name could lead outside the roots (`check_name`).
        MissingImageError: No root has such a file.
    """
    relative = check_name(name)
    candidates = [root / relative for root in roots]
    for candidate in chain(candidates, _other_forms(relative, roots)):
        if candidate.is_file():
            return candidate
    lines = "".join(f"\n  {candidate}" for candidate in candidates)
    raise MissingImageError(f"image {name!r} is missing; looked for{lines}")


def _other_forms(name: PurePosixPath, roots: Sequence[Path]) -> Iterator[Path]:
    """Yield the path of `name` below each root, in the Unicode form that the folder there uses."""
    if not str(name).isascii():
        yield from (find_file(root, name) for root in roots)


def paths_of(names: Sequence[Sequence[str]], roots: Sequence[Path]) -> list[Path]:
    """Return every image that some records show, once.

    Args:
        names: Those of each record.

    Raises:
        DataError: One is missing or outside its root.
    """
    return [resolve_image(name, roots) for name in dict.fromkeys(name for of_record in names for name in of_record)]


def load_image(path: Path) -> Image.Image:
    """Decode `path` in full to RGB, with Pillow's own conversion.

    Transparency is dropped, 16-bit greys saturate and EXIF rotation is ignored, as in the published code.

    Raises:
        DataError: It is not an image of `FORMATS`, its square has more than `MAX_PIXELS`, or it is truncated or
            corrupt.
    """
    return decode_image(path, str(path))


def decode_image(source: Path | BinaryIO, name: str) -> Image.Image:
    """Decode as `load_image` does, from a file or from its bytes; `name` identifies it in errors."""
    try:
        if isinstance(source, Path):
            check_regular(source)
        with Image.open(source, formats=FORMATS) as image:
            check_size(image, name)
            return image.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError:
        dicom = isinstance(source, Path) and begins_as_dicom(source)
        what = DICOM if dicom else f"not an image of a known format ({', '.join(FORMATS)})"
        raise DataError(f"{name}: not a readable image: {what}") from None
    # Pillow's decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error, … on damaged files.
    except Exception as error:
        raise DataError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error


def check_size(image: Image.Image, name: str) -> None:
    """Refuse an image before its pixels are decoded.

    Raises:
        DataError: It, or the square to which it is padded, has more than `MAX_PIXELS`.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) ** 2 > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} is padded to a square, which has more than {MAX_PIXELS:,} pixels; "
            "crop it or make it smaller"
        )


def is_deep(image: Image.Image) -> bool:
    """Return whether its greys have more than 8 bits; the conversion to RGB keeps only the values 0 to 255."""
    return image.mode.startswith(("I", "F"))


def turned(image: Image.Image) -> bool:
    """Return whether a viewer turns it upright but the conversion does not: EXIF orientation (Pillow turns TIFF
    itself)."""
    try:
        return image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # Viewers ignore damaged EXIF.
        return False


def see_through(image: Image.Image) -> bool:
    """Return whether it has transparent parts: viewers show the background, the conversion the colours hidden there."""
    if not image.has_transparency_data:
        return False
    darkest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return isinstance(darkest, int | float) and darkest < 255


def page_count(image: Image.Image) -> int:
    """Return the number of pages or frames of one picture; a camera's JPEG previews do not count."""
    try:
        return getattr(image, "n_frames", 1) if image.format in PAGED else 1
    except Exception:  # If the second is damaged, viewers show the first.
        return 1


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height, from the file's header alone.

    Raises:
        DataError: As `load_image`, as far as the header tells.
    """
    try:
        with Image.open(check_regular(path), formats=FORMATS) as image:
            return image.size
    except Exception:  # The decoder tells which of Pillow's errors it is.
        return load_image(path).size


def washed_out(path: Path) -> str | None:
    """Return how the model's view of a readable image differs from a viewer's; None if it does not.

    Raises:
        DataError: As `load_image`.
    """
    image = load_image(path)
    with Image.open(path, formats=FORMATS) as stored:
        on_its_side, pages, deep, mode = turned(stored), page_count(stored), is_deep(stored), stored.mode
        transparent = see_through(stored)
    if on_its_side:
        return "its EXIF orientation is not applied: the model sees it turned or mirrored"
    if pages > 1:
        return f"{pages} pages, of which the model sees the first"
    if transparent:
        return "it has transparent parts, of which the model sees the hidden colours"
    if image.getcolors(1) is not None:  # There is only one.
        return f"one single colour once decoded (stored as {mode})"
    if deep:
        return f"stored with more than 8 bits (mode {mode}), of which the conversion keeps the values 0 to 255 alone"
    return None


def pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre an RGB image on a square of its longer side; of two middle positions, the smaller offset."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def preprocess(image: Image.Image, processor: Any) -> "torch.Tensor":
    """Return the vision tower's input: float32, (3, height, width).

    The image is padded with the processor's mean colour, `int(255 * mean)` per channel, and then handed to
    `processor`: a CLIP image processor on the PIL backend, which resizes, crops, rescales and normalises.
    """
    red, green, blue = (int(255 * mean) for mean in processor.image_mean)
    square = pad_to_square(image, (red, green, blue))
    return processor(images=square, return_tensors="pt")["pixel_values"][0]


def check_images(
    paths: Iterable[Path], workers: int, progress: bool, cache: Path | None = None
) -> list[tuple[Path, str]]:
    """Return the images that cannot be decoded, as `inspect_images` finds them."""
    return inspect_images(paths, workers, progress, cache).bad


class Inspected(NamedTuple):
    """Images by their index, each with its problem or remark, in the order of the request."""

    bad: list[tuple[Path, str]]
    washed_out: list[tuple[Path, str]]


def inspect_images(paths: Iterable[Path], workers: int, progress: bool, cache: Path | None = None) -> Inspected:
    """Decode every image in `workers` processes; return the bad ones and those that look different in a viewer, with
    reasons.

    Only a few chunks of `paths` are in flight at a time, whatever their number. With a `cache` file, images that were
    good before (same path, size and modification time) are not decoded again, and newly good ones are added as they are
    found, so that an interrupted run resumes where it stopped.
    """
    marks = _read_marks(cache)
    inspected = _Found([], [])
    total = len(paths) if isinstance(paths, Sequence) else None
    with progress_bar(total=total, desc="images", unit="image", disable=not progress) as bar:
        pending = _new_images(enumerate(paths), marks, bar)
        with worker_pool(workers) as pool:
            for good, some in _bounded(pool, iter(lambda: list(islice(pending, _CHUNK)), []), 4 * workers):
                inspected.bad.extend(some.bad)
                inspected.washed_out.extend(some.washed_out)
                _add_marks(cache, good)
                bar.update(len(good) + len(some.bad) + len(some.washed_out))
    return Inspected(*([(path, why) for _, path, why in sorted(kind, key=lambda item: item[0])] for kind in inspected))


class _Found(NamedTuple):
    bad: list[tuple[int, Path, str]]
    washed_out: list[tuple[int, Path, str]]


_Numbered = tuple[int, Path]
_Checked = tuple[list[bytes], _Found]


def _bounded(pool: ProcessPoolExecutor, chunks: Iterator[list[_Numbered]], limit: int) -> Iterator[_Checked]:
    """Yield the results of `pool.map` without reading all of its input first."""
    running: set[Future[_Checked]] = set()
    for chunk in chunks:
        running.add(pool.submit(_check_chunk, chunk))
        if len(running) >= limit:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in running)


def _check_chunk(chunk: list[_Numbered]) -> _Checked:
    good, findings = [], _Found([], [])
    for number, path in chunk:
        try:
            loss = washed_out(path)
        except DataError as error:
            findings.bad.append((number, path, str(error).removeprefix(f"{path}: ")))
            continue
        if loss is None:
            good.append(_mark(path))
        else:  # It is not cached, so that the remark appears every time.
            findings.washed_out.append((number, path, loss))
    return good, findings


def _new_images(paths: Iterable[_Numbered], marks: set[bytes], bar: tqdm) -> Iterator[_Numbered]:
    for number, path in paths:
        if marks and _mark(path) in marks:
            bar.update()
        else:
            yield number, path


def _mark(path: Path) -> bytes:
    """Return a fingerprint of a file's path, size and modification time; empty if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return b""
    text = f"2 {status.st_size} {status.st_mtime_ns} {path.absolute()}"
    return hashlib.blake2b(os.fsencode(text), digest_size=_MARK_BYTES).digest()


def _read_marks(cache: Path | None) -> set[bytes]:
    if cache is None or not cache.is_file():
        return set()
    data = cache.read_bytes()
    whole = len(data) - len(data) % _MARK_BYTES  # A killed run may have left half a fingerprint.
    return {data[i : i + _MARK_BYTES] for i in range(0, whole, _MARK_BYTES)}


def _add_marks(cache: Path | None, marks: list[bytes]) -> None:
    if cache is not None and marks:
        with append_to(cache) as file:
            file.write(b"\0" * (-file.tell() % _MARK_BYTES) + b"".join(marks))
