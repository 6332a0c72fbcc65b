"""Raw downloads, as the sites ship them: folders, archives, and archives in those, seen as one list of files.

Nothing is ever written under a name that an archive chose. An archive with a member that would lead outside
of it, or with links or devices, is refused before anything of it is read.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path, PurePosixPath
from typing import IO

from mslora_cr.data.images import check_name
from mslora_cr.data.records import DataError

MAX_TABLE_BYTES = 512 << 20  # annotations and metadata are read whole
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
)


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file of a raw download: on its own (`member` empty) or inside the archive `container`.

    `path` is what it is matched by: where it lies below the download, archives counting as folders.
    """

    path: PurePosixPath
    container: Path
    member: str = ""
    size: int = 0
    checksum: int | None = None
    """CRC-32, where the archive states it."""


class RawData:
    """Everything below some folders and archives, as a context manager.

    Archives inside archives are unpacked to the folder `work`, which is removed at the end.

    Raises:
        DataError: a place does not exist, an archive is damaged or unsafe.
    """

    def __init__(self, places: Sequence[Path], work: Path):
        self.places, self.work = places, work
        self.files: list[RawFile] = []
        self._by_name: dict[str, list[RawFile]] = defaultdict(list)
        self._by_folder: dict[tuple[str, str], list[RawFile]] = defaultdict(list)
        self._visited: set[Path] = set()

    def __enter__(self) -> RawData:
        shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed
        try:
            for place in self.places:
                if not place.exists():
                    raise DataError(f"{place}: no such file or folder")
                if place.name.lower().endswith(_FOREIGN):
                    raise DataError(f"{place}: archives of this kind are not read; unpack it and give the folder")
                self._add(place, PurePosixPath(place.name) if place.is_file() else PurePosixPath())
        except BaseException:
            self.__exit__()
            raise
        for file in self.files:
            self._by_name[file.path.name].append(file)
            for folder in set(file.path.parts[:-1]):
                self._by_folder[folder, file.path.name].append(file)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _add(self, place: Path, path: PurePosixPath) -> None:
        if place.is_dir():
            if place.resolve() not in self._visited:  # a link may lead back up
                self._visited.add(place.resolve())
                for entry in sorted(place.iterdir()):
                    if not entry.name.startswith("."):
                        self._add(entry, path / entry.name)
        elif _is_archive(place.name):
            self._add_archive(place, path)
        elif place.is_file():
            self.files.append(RawFile(path, place, size=place.stat().st_size))

    def _add_archive(self, archive: Path, path: PurePosixPath) -> None:
        folder = path.parent / path.name.split(".")[0]
        nested: dict[RawFile, Sequence[Path]] = {}
        for name, size, checksum in _members(archive):
            file = RawFile(folder / name, archive, name, size, checksum)
            if _is_archive(name):
                nested[file] = [self.work / f"{len(self._visited)}-{len(nested)}-{file.path.name}"]
            else:
                self.files.append(file)
        self._visited.add(archive)
        extract(nested)
        for file, (target,) in nested.items():
            self._add_archive(target, file.path)

    def named(self, name: str) -> list[RawFile]:
        """The files whose own name is `name`, wherever they lie."""
        return self._by_name.get(name, [])

    def named_below(self, folder: str, name: str) -> list[RawFile]:
        """The files whose own name is `name`, anywhere below a folder of the name `folder`."""
        return self._by_folder.get((folder, name), [])

    def find(self, *suffixes: str) -> RawFile:
        """The file whose path ends with one of the suffixes; the first suffix that fits counts.

        Raises:
            DataError: none fits, or several different files fit.
        """
        for suffix in suffixes:
            parts = PurePosixPath(suffix).parts
            found = [file for file in self.named(parts[-1]) if file.path.parts[-len(parts) :] == parts]
            if len({fingerprint(file) for file in found}) > 1:
                places = "".join(f"\n  {file.path}" for file in found)
                raise DataError(f"{suffix}: the raw data contains several different ones; keep one:{places}")
            if found:
                return found[0]
        places = ", ".join(str(place) for place in self.places)
        raise DataError(f"{' or '.join(suffixes)}: not found in {places}")


def read(file: RawFile) -> bytes:
    """The content of an annotation or metadata file."""
    if file.size > MAX_TABLE_BYTES:
        raise DataError(f"{file.path}: {file.size:,} bytes is more than {MAX_TABLE_BYTES:,}")
    with _reading(file.container):
        return next(stream.read() for _, stream in _streams(file.container, {file.member}))


def fingerprint(file: RawFile) -> tuple[object, ...]:
    """Equal for files of equal content (in a tar archive, which has no checksums, for the same file only)."""
    if file.member:
        return (file.container, file.member) if file.checksum is None else (file.size, file.checksum)
    checksum = 0
    with file.container.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return file.size, checksum


def extract(wanted: Mapping[RawFile, Sequence[Path]], done: Callable[[], object] = lambda: None) -> None:
    """Copy files to their targets, reading each archive once, in its own order; `done` is called after each.

    A target appears under its name only when it is whole.

    Raises:
        DataError: an archive is damaged, or the disk has no room for what it says it holds.
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


def write_atomically(target: Path, stream: IO[bytes] | GzipFile) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name[:200]}.part")
    try:
        with partial.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _streams(container: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """The wanted members of an archive, or the plain file itself, which is the member ""."""
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


def _members(archive: Path) -> list[tuple[str, int, int | None]]:
    """(name, size, checksum) of the plain files of an archive, after checking all of its members."""
    with _reading(archive):
        members = list(_zip_members(archive) if _is_zip(archive) else _tar_members(archive))
    return [member for member in members if not _is_clutter(member[0])]


def _zip_members(path: Path) -> Iterator[tuple[str, int, int | None]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_member(path, member.filename, stat.S_ISLNK(member.external_attr >> 16))
            if not member.is_dir():
                yield member.filename, member.file_size, member.CRC


def _tar_members(path: Path) -> Iterator[tuple[str, int, int | None]]:
    with tarfile.open(path) as archive:
        for member in archive:
            _check_member(path, member.name, not (member.isfile() or member.isdir()))
            if member.isfile():
                yield member.name, member.size, None


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
    except _DAMAGED as error:
        raise DataError(f"{container}: damaged or unreadable ({error})") from error


def _is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


def _is_zip(path: Path) -> bool:
    return path.name.lower().endswith(".zip")


def _is_clutter(name: str) -> bool:
    """What macOS leaves in archives."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or parts[-1].startswith(("._", ".DS_Store"))
