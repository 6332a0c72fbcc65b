"""Logging of the commands: to standard error, from one process of a launch only.

Results go to standard output. Whoever uses the package as a library sets up `logging` as in any program; the loggers
are below `mslora_cr`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, ClassVar

from mslora_cr.utils.visible import is_first_rank, visible

NORMAL, QUIET, VERBOSE = logging.INFO, logging.WARNING, logging.DEBUG


class FirstRank(logging.Filter):
    """Passes messages of the first rank, and errors of every rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_first_rank()


class Console(logging.Handler):
    """Writes a line to standard error without disturbing progress bars, and escapes control characters."""

    PREFIX: ClassVar[dict[int, str]] = {logging.WARNING: "mslora-cr: warning: ", logging.ERROR: "mslora-cr: "}

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self.PREFIX.get(record.levelno, '')}{self.format(record)}"
        escaped = visible(text)
        if bars := sys.modules.get("tqdm"):
            bars.tqdm.write(escaped, file=sys.stderr)
        else:
            print(escaped, file=sys.stderr)
        sys.stderr.flush()


class VisibleRecord(logging.LogRecord):
    """Escapes control characters of a message, whichever handler shows it."""

    def getMessage(self) -> str:  # noqa: N802  (logging's own name)
        return visible(super().getMessage())


def _visible_warning(*args: Any, **kwargs: Any) -> str:
    return visible(_formatted(*args, **kwargs))


_formatted = warnings.formatwarning


def set_up(level: int = NORMAL) -> None:
    """Show the package's messages from a level on; with `QUIET`, hide progress bars too."""
    logger = logging.getLogger("mslora_cr")
    console = Console()
    console.addFilter(FirstRank())
    logger.handlers = [console]
    logger.setLevel(level)
    logger.propagate = False  # If a library configured the root logger, each message would appear twice.
    if level >= QUIET:
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads this when it is imported.
    # transformers and others repeat names from files in their own messages.
    logging.setLogRecordFactory(VisibleRecord)
    warnings.formatwarning = _visible_warning
    # When PEFT looks for the package, it recommends further packages; and it recommends float16 at every 8-bit layer of
    # every forward pass.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It says what it changed in a header, but not in whose. What cannot be read is refused by name.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
