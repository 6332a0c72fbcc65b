"""A pool whose parent is killed leaves no process behind."""

import os
import signal
import subprocess
import sys

from tests.distributed.launch import alive, wait_until

POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from mslora_cr.utils.workers import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_killed_parent(tmp_path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert alive(worker)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not alive(worker), timeout=20)
