"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A hidden path beside `path`, to be written in the block; then it is flushed to disk and renamed to `path`.

    A block that fails leaves nothing. What a killed process leaves is overwritten the next time.

    Args:
        shared: several processes may write the same file at once: the hidden name is not used twice, so they do not
            meet, and what a killed one leaves stays.
    """
    partial = path.with_name(f".{path.name[:60]}{f'.{secrets.token_hex(4)}' if shared else ''}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(staging: Path, folder: Path) -> None:
    """Flush a finished folder to disk and give it its name; an older one of that name goes last."""
    for file in sorted(staging.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
