"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
