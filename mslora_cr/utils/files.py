"""Writes files and folders atomically, through unpredictable temporary names, never through a link."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mslora_cr.utils.errors import UserError
from mslora_cr.utils.regular import check_regular


@contextmanager
def replacing(path: Path, shared: bool = False, flush: bool = True) -> Iterator[Path]:
    """A new hidden file next to `path`, to be written in the block; then it is flushed to disk and renamed to `path`.

    A block that fails leaves nothing. What a killed process leaves is removed when `path` is written again.

    Args:
        shared: the folder may hold thousands of such files, so it is not searched for what killed processes left.
        flush: not where a file that a power cut empties is made again anyway.
    """
    if not shared:
        _remove_leftovers(path)
    with _hidden(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield partial
            partial.chmod(mode)  # libraries may have put a file of their own mode there
            if flush:
                _flush(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whole or not at all. Half a surrogate pair, which UTF-8 cannot spell, is written as its escape."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def append_to(path: Path) -> BinaryIO:
    """A file, opened to add to its end; it is made if it is not there.

    Raises:
        UserError: it is a link.
        OSError: it is no regular file, or cannot be written.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through links; remove it")
    if path.exists():
        check_regular(path)
    return _appending(path, os.O_CREAT)


def resumable(path: Path, content: str) -> BinaryIO:
    """A hidden file beside `path`, opened to add to its end: what a killed process left of the same content, or a new
    one, under a name that nobody can have made before.

    Args:
        content: what tells the content from another that `path` could have, such as its digest.
    """
    prefix = f"{_prefix(path)}{content}-"
    for left in sorted(path.parent.iterdir()):
        if left.name.startswith(prefix) and left.suffix == ".part" and not left.is_symlink() and left.is_file():
            file = _appending(left, 0)
            status = os.fstat(file.fileno())
            if (status.st_nlink, status.st_uid) == (1, os.geteuid()):
                return file
            file.close()  # another name of a file that is not ours to write
    new = path.with_name(f"{prefix}{secrets.token_hex(8)}.part")
    return _appending(new, os.O_CREAT | os.O_EXCL)


def _appending(path: Path, flags: int) -> BinaryIO:
    """A file opened to add to its end, but not through a link."""

    def opener(name: str, _: int) -> int:
        return os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | flags, 0o666)

    return open(path, "ab", opener=opener)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """As `replacing`, for a folder: a new hidden one, to be filled in the block."""
    with hidden_folder(folder) as staging:
        yield staging
        replace_folder(staging, folder)


@contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `place`, which is removed after the block; what killed processes left of earlier ones
    is removed before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    with _hidden(target) as folder:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(staging: Path, folder: Path) -> None:
    """Flush a finished folder to disk and give it its name; an older one of that name goes last.

    Its files get the mode that the umask gives, as the folder did: safetensors makes files that only their owner reads.
    """
    mode = stat.S_IMODE(staging.stat().st_mode) & 0o666
    for file in sorted(staging.rglob("*")):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
            _flush(file)
    _remove_leftovers(folder)
    with _hidden(folder) as old:
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


_in_use: set[Path] = set()
"""Hidden names of this process that are no leftovers."""


@contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """A name next to `path` that nobody can have made, with the process that makes it."""
    name = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(8)}.tmp")
    _in_use.add(name)
    try:
        yield name
    finally:
        _in_use.discard(name)


def _prefix(path: Path) -> str:
    return f".{path.name[:60]}."


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that are gone have left of earlier attempts to write `path`."""
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        pid, _, rest = entry.name.removeprefix(_prefix(path)).partition("-")
        ours = entry.name.startswith(_prefix(path)) and pid.isdecimal() and len(rest) == 20 and rest.endswith(".tmp")
        if not ours or (entry in _in_use if int(pid) == os.getpid() else _lives(int(pid))):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with check_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
