"""Finds the files below a folder, through links too."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePath


def files_below(folder: Path) -> list[Path]:
    """Yield every regular file below a folder, in order.

    Linked folders are followed, each folder once, since a link may lead back up. Hidden files and folders are skipped,
    and so is what macOS leaves in archives.
    """
    return sorted(_files(folder, set()))


def _files(folder: Path, seen: set[str]) -> Iterator[Path]:
    resolved = os.path.realpath(folder)
    if resolved in seen:
        return
    seen.add(resolved)
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # We may not read this folder.
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            yield from _files(entry, seen)
        elif entry.is_file():
            yield entry


def find_file(root: Path, name: PurePath) -> Path:
    """Find a file below a folder; if its name is missing, take one that is the same in another Unicode form, since
    macOS decomposes accented letters."""
    path = root / name
    if str(name).isascii() or path.is_file():
        return path
    folder = root
    for part in name.parts:
        if not (folder / part).exists():
            part = _listing(folder, _changed(folder)).get(composed(part), part)
        folder = folder / part
    return folder


def composed(name: str) -> str:
    """Find names that differ only in their Unicode form: macOS writes an accented letter as two characters."""
    return unicodedata.normalize("NFC", name)


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(64)
def _listing(folder: Path, _changed: int) -> dict[str, str]:
    """Return the names in a folder by their composed form, as of the folder's last change."""
    try:
        return {composed(entry.name): entry.name for entry in folder.iterdir()}
    except OSError:
        return {}
