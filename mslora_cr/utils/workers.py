"""Worker processes: their number on this machine, and their end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of worker processes that end with this one."""
    context = multiprocessing.get_context("spawn")  # Forking a process that holds torch's threads may hang.
    return ProcessPoolExecutor(workers, context, end_with_parent)


def end_with_parent() -> None:
    """End this worker when its parent ends, even if that is killed; otherwise an idle worker would wait forever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process may call this"
    parent.join()
    os._exit(1)
