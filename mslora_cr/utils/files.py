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
    """Yield a new hidden file beside `path`; after the block it is flushed to disk and renamed to `path`.

    If the block fails, the hidden file is removed. What a killed process left is removed when `path` is written again.

    Args:
        shared: The folder may hold thousands of such files, so it is not searched for the remains of killed processes.
        flush: Flush the file to disk. Leave it out where an emptied file is simply made again.
    """
    if not shared:
        _remove_leftovers(path)
    with _hidden(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield partial
            partial.chmod(mode)  # A library may have given the file a mode of its own.
            if flush:
                _flush(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all. Half a surrogate pair, which UTF-8 cannot encode, becomes its
    escape."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def append_to(path: Path) -> BinaryIO:
    """Open a file to append to it; create it if it is missing.

    Raises:
        UserError: The path is a link.
        OSError: The path is no regular file, or cannot be written.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link, and links are never written through; remove it")
    if path.exists():
        check_regular(path)
    return _appending(path, os.O_CREAT)


def resumable(path: Path, content: str) -> BinaryIO:
    """Open a hidden file beside `path` to append to it: one that a killed process left for the same content, or a new
    one.

    A new file has a name that nobody can have guessed.

    Args:
        path: The file that is being made.
        content: Identifies the content, such as its digest.
    """
    prefix = f"{_prefix(path)}{content}-"
    for left in sorted(path.parent.iterdir()):
        if left.name.startswith(prefix) and left.suffix == ".part" and not left.is_symlink() and left.is_file():
            file = _appending(left, 0)
            status = os.fstat(file.fileno())
            if (status.st_nlink, status.st_uid) == (1, os.geteuid()):
                return file
            file.close()  # Another name of a file that does not belong to us.
    new = path.with_name(f"{prefix}{secrets.token_hex(8)}.part")
    return _appending(new, os.O_CREAT | os.O_EXCL)


def _appending(path: Path, flags: int) -> BinaryIO:
    """Open a file to append to it, but not through a link."""

    def opener(name: str, _: int) -> int:
        return os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | flags, 0o666)

    return open(path, "ab", opener=opener)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new hidden folder to fill, which takes the place of `folder` after the block; as `replacing`."""
    with hidden_folder(folder) as staging:
        yield staging
        replace_folder(staging, folder)


@contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `target`, and remove it after the block. The remains of killed processes are
    removed first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    with _hidden(target) as folder:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(staging: Path, folder: Path) -> None:
    """Flush a finished folder to disk and give it its name; the folder that had this name is removed last.

    Its files get the mode that the umask gives, as the folder did: safetensors makes files that only their owner can
    read.
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
"""Hidden names in use by this process: no remains."""


@contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that contains the process ID and that nobody can have guessed."""
    name = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(8)}.tmp")
    _in_use.add(name)
    try:
        yield name
    finally:
        _in_use.discard(name)


def _prefix(path: Path) -> str:
    return f".{path.name[:60]}."


def _remove_leftovers(path: Path) -> None:
    """Remove what dead processes left when they tried to write `path`."""
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
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with check_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
