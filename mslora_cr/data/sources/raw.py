"""Raw downloads, as the sites ship them: folders, archives, and archives in those, seen as one list of files.

No file is ever written under a name that an archive chose. An archive with a member that would lead outside of it, or
with links or devices, is refused before anything in it is read.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from pathlib import Path, PurePosixPath
from typing import IO

from mslora_cr.data.images import check_name
from mslora_cr.data.records import DataError
from mslora_cr.utils.files import replacing
from mslora_cr.utils.walk import composed

MAX_TABLE_BYTES = 512 << 20  # annotations and metadata are read whole
MOST_NESTED_BYTES, MOST_NESTED, MOST_DEPTH = 64 << 30, 1_000, 4
"""Limits of archives inside archives: unpacked bytes in total, number, and depth."""
MOST_EXPANSION, EXPANSION_SLACK = 200, 1 << 30
"""The factor by which an archive may expand, beyond the first GB: images expand little, tables by tens."""
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_FOREIGN = (".7z", ".rar")
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    # What tarfile and zipfile raise of headers that make no sense:
    BadGzipFile,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    struct.error,
)
_SUFFIXES = {".jpg": ".jpg", ".jpeg": ".jpg", ".tif": ".tif", ".tiff": ".tif"}
"""Extensions of the same format."""


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file of a raw download: by itself (`member` empty) or inside the archive `container`.

    `path` is its location below the download, with archives counting as folders; names are matched with it.
    """

    path: PurePosixPath
    container: Path
    member: str = ""
    size: int = 0
    checksum: int | None = None
    """CRC-32, if the archive states it."""


class RawData:
    """Everything below some folders and archives, as a context manager.

    Archives inside archives are unpacked to the folder `work`, which is removed at the end.

    Raises:
        DataError: A source does not exist, or an archive is damaged or unsafe.
    """

    def __init__(self, sources: Sequence[Path], work: Path):
        self.sources, self.work = sources, work
        self.files: list[RawFile] = []
        self._by_name: dict[str, list[RawFile]] = defaultdict(list)
        self._by_folder: dict[tuple[str, str], list[RawFile]] = defaultdict(list)
        self._visited: set[Path] = set()
        self._nested, self._nested_bytes = 0, 0

    def __enter__(self) -> RawData:
        shutil.rmtree(self.work, ignore_errors=True)  # A killed run left it.
        try:
            for source in self.sources:
                if not source.is_dir() and not source.is_file():
                    what = "neither a file nor a folder" if source.exists() else "no such file or folder"
                    raise DataError(f"{source}: {what}")
                if source.name.lower().endswith(_FOREIGN):
                    raise DataError(f"{source}: archives of this kind cannot be read; unpack it and give the folder")
                self._add(source, PurePosixPath(source.name) if source.is_file() else PurePosixPath())
        except BaseException:
            self.__exit__()
            raise
        for file in self.files:
            for name in {file.path.name, alike(file.path.name)}:
                self._by_name[name].append(file)
                for folder in {composed(part) for part in file.path.parts[:-1]}:
                    self._by_folder[folder, name].append(file)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _add(self, source: Path, path: PurePosixPath) -> None:
        if source.is_dir():
            if source.resolve() not in self._visited:  # A link may lead back up.
                self._visited.add(source.resolve())
                for entry in sorted(source.iterdir()):
                    if not entry.name.startswith(".") and entry.name != "__MACOSX":
                        self._add(entry, path / entry.name)
        elif not source.is_file():  # A FIFO would wait forever.
            return
        elif _is_archive(source.name):
            self._add_archive(source, path)
        else:
            self.files.append(RawFile(path, source, size=source.stat().st_size))

    def _add_archive(self, archive: Path, path: PurePosixPath, depth: int = 0) -> None:
        folder = path.parent / path.name.split(".")[0]
        nested: dict[RawFile, Sequence[Path]] = {}
        for name, member, size, checksum in _members(archive):
            file = RawFile(folder / name, archive, member, size, checksum)
            if _is_archive(name):
                self._count_nested(file, depth + 1)
                nested[file] = [self.work / f"{len(self._visited)}-{len(nested)}-{file.path.name}"]
            else:
                self.files.append(file)
        self._visited.add(archive)
        extract(nested)
        for file, (target,) in nested.items():
            self._add_archive(target, file.path, depth + 1)

    def _count_nested(self, file: RawFile, depth: int) -> None:
        self._nested, self._nested_bytes = self._nested + 1, self._nested_bytes + file.size
        if depth > MOST_DEPTH or self._nested > MOST_NESTED or self._nested_bytes > MOST_NESTED_BYTES:
            raise DataError(
                f"{file.path}: refused: archives inside archives are unpacked down to {MOST_DEPTH} levels, at most "
                f"{MOST_NESTED:,} of them and {MOST_NESTED_BYTES >> 30} GB in all; unpack it and give the folder"
            )

    def named(self, name: str) -> list[RawFile]:
        """Return the files with this name, anywhere; if there are none, those whose name is `alike`."""
        return self._by_name.get(name) or self._by_name.get(alike(name), [])

    def named_below(self, folder: str, name: str) -> list[RawFile]:
        """Do what `named` does, anywhere below a folder called `folder`."""
        folder = composed(folder)
        return self._by_folder.get((folder, name)) or self._by_folder.get((folder, alike(name)), [])

    def has(self, *suffixes: str) -> bool:
        """Return whether the path of some file ends with one of the suffixes."""
        wanted = [PurePosixPath(suffix).parts for suffix in suffixes]
        return any(file.path.parts[-len(parts) :] == parts for parts in wanted for file in self.named(parts[-1]))

    def find(self, *suffixes: str) -> RawFile:
        """Return the file whose path ends with one of the suffixes; the first suffix that fits counts.

        Raises:
            DataError: None fits, or several different files fit.
        """
        for suffix in suffixes:
            parts = PurePosixPath(suffix).parts
            files = [file for file in self.named(parts[-1]) if file.path.parts[-len(parts) :] == parts]
            if len({fingerprint(file) for file in files}) > 1:
                listing = "".join(f"\n  {file.path}" for file in files)
                raise DataError(f"{suffix}: the raw data contains several different ones; keep one:{listing}")
            if files:
                return files[0]
        listing = ", ".join(str(source) for source in self.sources)
        raise DataError(f"{' or '.join(suffixes)}: not found in {listing}")


def with_ending(name: str) -> str:
    """Return an image's name from an id, which in some copies of a release includes its extension."""
    endings = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm")
    return name if PurePosixPath(name).suffix.lower() in endings else f"{name}.jpg"


def alike(name: str) -> str:
    """Return the same for names that differ in case, in their Unicode form, or in how the ending of one format is
    written (`.JPEG`, `.jpg`)."""
    path = PurePosixPath(composed(name.casefold()))
    return path.stem + _SUFFIXES.get(path.suffix, path.suffix)


class Bounded:
    """A stream of unknown length, read up to a limit."""

    def __init__(self, stream: IO[bytes] | GzipFile, archive: Path, most: int = MOST_NESTED_BYTES) -> None:
        self._stream, self._archive, self._left = stream, archive, most

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"{self._archive}: refused: it unpacks to more than {MOST_NESTED_BYTES >> 30} GB")
        return data


def read(file: RawFile) -> bytes:
    """Return the content of an annotation or metadata file."""
    if file.size > MAX_TABLE_BYTES:
        raise DataError(f"{file.path}: {file.size:,} bytes is more than {MAX_TABLE_BYTES:,}")
    with _reading(file.container):
        return next(stream.read() for _, stream in _streams(file.container, {file.member}))


def fingerprint(file: RawFile) -> tuple[object, ...]:
    """Return a key that is equal for files of equal content; in a tar archive, which has no checksums, only for the
    same file."""
    if file.member:
        return (file.container, file.member) if file.checksum is None else (file.size, file.checksum)
    checksum = 0
    with file.container.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return file.size, checksum


def blob_ids(files: Sequence[RawFile]) -> dict[RawFile, str]:
    """Return the id that git gives to the content of each file: SHA-1 with a header."""
    members: dict[Path, dict[str, RawFile]] = defaultdict(dict)
    for file in files:
        members[file.container][file.member] = file
    ids = {}
    for container, wanted in members.items():
        with _reading(container):
            for member, stream in _streams(container, set(wanted)):
                content = Bounded(stream, container, MAX_TABLE_BYTES).read()
                header = b"blob %d\0" % len(content)
                ids[wanted[member]] = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    return ids


def extract(wanted: Mapping[RawFile, Sequence[Path]], done: Callable[[], object] = lambda: None) -> None:
    """Copy files to their targets, reading each archive once, in its own order; `done` is called after each.

    A target appears under its name only when it is whole.

    Raises:
        DataError: An archive is damaged, or the disk has no room for what it says it holds.
    """
    by_container: dict[Path, dict[str, Sequence[Path]]] = defaultdict(dict)
    for file, targets in wanted.items():
        _check_room(file, targets)
        by_container[file.container][file.member] = targets
    for container, members in by_container.items():
        with _reading(container):
            for name, stream in _streams(container, set(members)):
                for number, target in enumerate(members[name]):
                    if number:
                        stream.seek(0)
                    write_atomically(target, stream)
                done()


def _check_room(file: RawFile, targets: Sequence[Path]) -> None:
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if file.size > free:
            raise DataError(f"{file.path}: claims {file.size:,} bytes; {free:,} are free at {target.parent}")


def write_atomically(target: Path, stream: IO[bytes] | GzipFile | Bounded) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, shared=True, flush=False) as partial, partial.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)


def _streams(container: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the wanted members of an archive, or the plain file itself, which is the member ""."""
    if wanted == {""}:
        with container.open("rb") as stream:
            yield "", stream
    elif _is_zip(container):
        with zipfile.ZipFile(container) as archive:
            for name in archive.namelist():
                if name in wanted:
                    with archive.open(name) as stream:
                        yield name, stream
    else:
        with tarfile.open(container) as tar:
            for member in tar:
                if member.name in wanted:
                    plain = tar.extractfile(member)
                    assert plain is not None, "only plain files are listed"
                    yield member.name, plain


Member = tuple[str, str, int, int | None]
"""Its path, its name in the archive, its unpacked size (with holes, for a sparse file), and its checksum."""


def _members(archive: Path) -> list[Member]:
    """Return the plain files of an archive, after checking all of its members."""
    most = EXPANSION_SLACK + MOST_EXPANSION * archive.stat().st_size
    members, total = [], 0
    with _reading(archive):
        for member in _zip_members(archive) if _is_zip(archive) else _tar_members(archive):
            total += member[2]
            if total > most:
                raise DataError(
                    f"{archive}: refused: its members unpack to more than {MOST_EXPANSION} times its own size, as "
                    "those of an archive bomb do; if you trust it, unpack it and give the folder"
                )
            if not _is_clutter(member[0]):
                members.append(member)
    return members


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _zip_name(member)
            _check_member(path, name, stat.S_ISLNK(member.external_attr >> 16))
            if not name.endswith("/"):
                yield name, member.filename, member.file_size, member.CRC


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Return a member's path: some programs write UTF-8 without marking it, and some on Windows write backslashes."""
    name = member.filename
    if not member.flag_bits & 0x800 and not name.isascii():  # zipfile takes it for code page 437.
        with suppress(UnicodeError):  # In some other encoding it is as good a name as any.
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path) as archive:
        for member in archive:
            _check_member(path, member.name, not (member.isfile() or member.isdir()))
            if member.isfile():
                yield member.name, member.name, member.size, None


def _check_member(archive: Path, name: str, special: bool) -> None:
    if special:
        raise DataError(f"{archive}: refused: member {name!r} is a link or a device, not a plain file")
    try:
        if name.rstrip("/") not in ("", "."):
            check_name(name)
    except DataError:
        raise DataError(f"{archive}: refused: member {name!r} would be extracted outside") from None


@contextmanager
def _reading(container: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{container}: damaged or unreadable ({error or type(error).__name__})") from error


def _is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


def _is_zip(path: Path) -> bool:
    return path.name.lower().endswith(".zip")


def _is_clutter(name: str) -> bool:
    """Return whether a file is one that macOS leaves in archives."""
    parts = PurePosixPath(name).parts
    return not parts or "__MACOSX" in parts or parts[-1].startswith(("._", ".DS_Store"))
