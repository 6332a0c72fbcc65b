"""Opens regular files only: reading a FIFO could wait forever, and a device may have no end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def check_regular(path: Path) -> Path:
    """Return the path if it leads to a regular file; open nothing.

    Raises:
        OSError: The file is missing, or is not a regular file.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # The name contains a NUL.
        raise OSError(errno.EINVAL, f"not a valid file name ({error})", str(path)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, but a file is expected", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def check_all_regular(folder: Path) -> None:
    """Check that a folder holds nothing but folders and regular files, at any depth: libraries open whatever is there.

    Raises:
        OSError: Something else is there, or a link leads nowhere; the message names it.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path)
