"""Allows one writer per folder, on all hosts that share it: a lock of the operating system, and a sign of life.

The lock is POSIX's (`fcntl.lockf`). The kernel releases it when its process ends in any way; worker processes do not
inherit it; over NFS it holds between hosts. Some file systems limit it to one host (Lustre without `flock`), or have no
locks. For those the writer also gives a sign of life every few seconds: a folder whose lock is free, but whose last
writer was on another host, is taken only after a minute without one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from mslora_cr.config.schema import StreamConfig
from mslora_cr.distributed.comm import rank
from mslora_cr.distributed.launch import start_processes
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.state import StateError, StateFile

LOCK, WRITER = ".lock", ".writer.json"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


class LockedError(UserError):
    """Another process writes to this folder."""


class Writer(StateFile):
    """`.writer.json`: who writes to the folder. `boot` identifies one start of a host; `beat` counts."""

    MEND: ClassVar[str] = "remove it, if no process writes to this folder"

    host: str
    boot: str
    pid: int
    since: str
    command: str
    beat: int = 0

    @classmethod
    def this(cls) -> Writer:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        command = shlex.join(["mslora-cr", *sys.argv[1:]])[:200]
        return cls(host=socket.gethostname(), boot=_boot(), pid=os.getpid(), since=now, command=command)


def _boot() -> str:
    return _BOOT.read_text().strip() if _BOOT.is_file() else socket.gethostname()


_held: set[Path] = set()
"""Folders that this process writes to; its own lock would not stop it."""


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep other launches from writing to this folder inside the block. All ranks of a launch are one writer, and the
    first rank holds the lock.

    Raises:
        LockedError: Another launch writes there; the message names host, process and since when. Nothing was written.
    """
    if rank() != 0:
        yield
        return
    resolved = folder.resolve()
    made = [parent for parent in (resolved, *resolved.parents) if not parent.exists()]
    resolved.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(resolved):
            yield
    finally:
        for parent in made:
            with suppress(OSError):  # The folder is no longer empty.
                parent.rmdir()


@contextmanager
def launch(config: StreamConfig, folder: Path) -> Iterator[None]:
    """Start this launch's processes, and let no other launch write to a folder until the block ends.

    Raises:
        ConfigError: The `training` section is wrong, which has the processes' timeout.
        LockedError: Another launch writes to the folder.
    """
    start_processes(config)
    with one_writer(folder):
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if folder in _held:
        raise LockedError(f"{folder} is already being written by this process")
    descriptor = _take(folder)
    _held.add(folder)
    ended = threading.Event()
    try:
        _wait_for_silence(folder)
        writer = Writer.this()
        writer.write(folder / WRITER)
        beating = threading.Thread(target=_beat, args=(folder, writer, ended), name="writer", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            for name in (WRITER, LOCK):
                (folder / name).unlink(missing_ok=True)
    finally:
        _held.discard(folder)
        os.close(descriptor)


def _take(folder: Path) -> int:
    """Open and lock the lock file. Whoever ends removes it, so it may be another file than the one that was opened."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise _refusal(folder) from None
            log.debug("%s: this file system has no locks (%s)", folder, error)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _wait_for_silence(folder: Path) -> None:
    """Check, if the last writer was on another host and did not end in order, whether it still lives."""
    last = _last_writer(folder)
    if last is None or last.boot == _boot():  # This host's kernel knows: the lock was free.
        return
    log.warning(
        "%s: its last writer, process %d on %s, did not end in order; waiting %.0f s for a sign of life",
        folder,
        last.pid,
        last.host,
        SILENCE_SECONDS,
    )
    deadline = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE_SECONDS / 10))
        if _last_writer(folder) not in (last, None):
            raise _refusal(folder)


def _last_writer(folder: Path) -> Writer | None:
    with suppress(StateError):
        return Writer.read_if_there(folder / WRITER)
    return None


def _refusal(folder: Path) -> LockedError:
    writer = _last_writer(folder)
    who = f"process {writer.pid} on {writer.host}, since {writer.since} ({writer.command})" if writer else "a process"
    return LockedError(
        f"{folder} is being written by another launch: {who}. Wait for it or stop it; nothing was written. If its host "
        f"is gone for good, remove {folder / LOCK}"
    )


def _beat(folder: Path, writer: Writer, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        with suppress(OSError):  # A full disk must not end the run here.
            writer.model_copy(update={"beat": beat}).write(folder / WRITER)
