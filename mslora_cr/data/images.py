"""Images of a task: finding them under the data root only, decoding them, and making the tower's pixels."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image
from tqdm import tqdm

from mslora_cr.data.records import DataError
from mslora_cr.utils.workers import worker_pool

if TYPE_CHECKING:  # torch is slow to import, and the processes that only check images never need it
    import torch

MAX_PIXELS = 80_000_000  # 240 MB once decoded to RGB; anything larger is taken for a decompression bomb
# Raster formats only: Pillow would hand some of the others (EPS) to an outside program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")

_CHUNK = 32  # images a worker checks between two reports
_MARK_BYTES = 16


def image_roots(data_root: Path, folder: str, image_folders: Sequence[str] = ()) -> list[Path]:
    """Where the names in a task's annotations may start: its folder, the data root, its image folders."""
    task = data_root / folder
    return [task, data_root, *(task / name for name in image_folders)]


def tower_folder(model: Path, name: str) -> Path | None:
    """The folder of the vision tower that a model's configuration calls `name`, unless it is on the hub only.

    A folder in the model's own, beside it (`pretrained_models/openai/…` beside `pretrained_models/llava_med_v1.5`), or
    below the working directory; or an absolute one.
    """
    return next((folder for folder in (model / name, model.parent / name, Path(name)) if folder.is_dir()), None)


def check_name(name: str) -> PurePosixPath:
    """`name` as a relative path that stays below whatever it is joined to.

    Raises:
        DataError: it is empty, absolute, climbs with `..`, holds a backslash, a drive or a NUL character, or
            a part of it is longer than file systems allow.
    """
    path = PurePosixPath(name)
    safe = path.parts and not path.is_absolute() and ".." not in path.parts and not PureWindowsPath(name).drive
    if not safe or "\\" in name or "\0" in name or max(len(os.fsencode(part)) for part in path.parts) > 255:
        raise DataError(f"image {name!r}: expected a relative path below the data root, with '/' and no '..'")
    return path


def resolve_image(name: str, roots: Sequence[Path]) -> Path:
    """The first existing `root/name`. Folders that the user linked into a root are followed.

    Raises:
        DataError: the name could lead outside the roots (`check_name`), or no root has such a file.
    """
    relative = check_name(name)
    candidates = [root / relative for root in roots]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = "".join(f"\n  {candidate}" for candidate in candidates)
    raise DataError(f"image {name!r} is missing; looked for{places}")


def load_image(path: Path) -> Image.Image:
    """Decode `path` in full to RGB, with Pillow's own conversion: transparency is dropped, 16-bit greys
    saturate and EXIF rotation is ignored, as in the published code.

    Raises:
        DataError: not an image of `FORMATS`, larger than `MAX_PIXELS`, truncated or corrupt.
    """
    return decode_image(path, str(path))


def decode_image(source: Path | BinaryIO, name: str) -> Image.Image:
    """As `load_image`, from a file or from its bytes; `name` says in errors what it is."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
            return image.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {MAX_PIXELS:,} pixels") from error
    # Pillow's decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error, … on damaged files.
    except Exception as error:
        raise DataError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error


def pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre an RGB image on a square of its longer side; of two middles, the lower offset."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def preprocess(image: Image.Image, processor: Any) -> "torch.Tensor":
    """What the vision tower reads: float32, (3, height, width).

    The image is padded with the processor's mean colour, `int(255 * mean)` per channel, and then handed to
    `processor`: a CLIP image processor on the PIL backend, which resizes, crops, rescales and normalises.
    """
    red, green, blue = (int(255 * mean) for mean in processor.image_mean)
    square = pad_to_square(image, (red, green, blue))
    return processor(images=square, return_tensors="pt")["pixel_values"][0]


def check_images(
    paths: Iterable[Path], workers: int, progress: bool, cache: Path | None = None
) -> list[tuple[Path, str]]:
    """Decode every image in `workers` processes; give the bad ones, with reasons, in the order of `paths`.

    Only a few chunks of `paths` are in flight at a time, whatever its length. With a `cache` file, images
    found good before (same path, size and modification time) are not decoded again, and newly good ones are
    added as they are found, so that an interrupted run resumes where it stopped.
    """
    known = _read_marks(cache)
    bad: list[tuple[int, Path, str]] = []
    total = len(paths) if isinstance(paths, Sequence) else None
    with tqdm(total=total, desc="images", unit="image", disable=not progress) as bar:
        pending = _new_images(enumerate(paths), known, bar)
        with worker_pool(workers) as pool:
            for good, found in _bounded(pool, iter(lambda: list(islice(pending, _CHUNK)), []), 4 * workers):
                bad += found
                _add_marks(cache, good)
                bar.update(len(good) + len(found))
    return [(path, problem) for _, path, problem in sorted(bad, key=lambda item: item[0])]


_Numbered = tuple[int, Path]
_Checked = tuple[list[bytes], list[tuple[int, Path, str]]]


def _bounded(pool: ProcessPoolExecutor, chunks: Iterator[list[_Numbered]], limit: int) -> Iterator[_Checked]:
    """`pool.map` without reading all of its input first."""
    running: set[Future[_Checked]] = set()
    for chunk in chunks:
        running.add(pool.submit(_check_chunk, chunk))
        if len(running) >= limit:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in running)


def _check_chunk(chunk: list[_Numbered]) -> _Checked:
    good, bad = [], []
    for number, path in chunk:
        try:
            load_image(path)
            good.append(_mark(path))
        except DataError as error:
            bad.append((number, path, str(error).removeprefix(f"{path}: ")))
    return good, bad


def _new_images(paths: Iterable[_Numbered], known: set[bytes], bar: tqdm) -> Iterator[_Numbered]:
    for number, path in paths:
        if known and _mark(path) in known:
            bar.update()
        else:
            yield number, path


def _mark(path: Path) -> bytes:
    """A fingerprint of a file's path, size and modification time; empty where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return b""
    text = f"{status.st_size} {status.st_mtime_ns} {path.absolute()}"
    return hashlib.blake2b(os.fsencode(text), digest_size=_MARK_BYTES).digest()


def _read_marks(cache: Path | None) -> set[bytes]:
    if cache is None or not cache.exists():
        return set()
    data = cache.read_bytes()
    whole = len(data) - len(data) % _MARK_BYTES  # a killed run may have left half a mark
    return {data[i : i + _MARK_BYTES] for i in range(0, whole, _MARK_BYTES)}


def _add_marks(cache: Path | None, marks: list[bytes]) -> None:
    if cache is not None and marks:
        with cache.open("ab") as file:
            file.write(b"\0" * (-file.tell() % _MARK_BYTES) + b"".join(marks))
