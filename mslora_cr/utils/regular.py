"""Opens regular files only: a FIFO would wait for a writer for ever, and a device may have no end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def check_regular(path: Path) -> Path:
    """The path itself, if it leads to a regular file; nothing is opened.

    Raises:
        OSError: there is none, or something else is there.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, f"no name of a file ({error})", str(path)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is expected", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def check_all_regular(folder: Path) -> None:
    """See that a folder, however deep, holds nothing but folders and regular files: libraries open what is there.

    Raises:
        OSError: names what is something else, or a link that leads to nothing.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path)
