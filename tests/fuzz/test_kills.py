"""A run on two tasks killed before every change it makes to the file system: the same command ends it all the same.

`make fuzz` kills at every event; `make test-all` at a few.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.cli.main import main
from tests.conftest import ConfigWriter, bank_bytes
from tests.fuzz.test_fuzz import TIMES

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.helpers.killing"])


def run(arguments: list[str], root: Path, kill_at: int, output: Path) -> int:
    """Run a command, killed before its n-th change below a folder; gives how many it came to, as far as it came."""
    process = _CONTEXT.Process(target=_run, args=(arguments, str(root), kill_at, str(output)))
    process.start()
    process.join(timeout=240)
    assert process.exitcode in (0, -signal.SIGKILL), f"{process.exitcode}: {output.read_text()[-3000:]}"
    return len(Path(f"{output}.events").read_text().splitlines())


def _run(arguments: list[str], root: str, kill_at: int, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    events = os.open(f"{output}.events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)
        if not changes or not str(args[0]).startswith(root):
            return
        count += 1
        os.write(events, f"{event} {args[0]}\n".encode())
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    raise SystemExit(main(arguments))


@pytest.mark.long
def test_a_run_that_is_killed_at_any_change_ends_as_without(config_file: ConfigWriter, tmp_path: Path) -> None:
    def command(name: str) -> tuple[list[str], Path]:
        path = config_file(output_dir=str(tmp_path / name), results_dir=str(tmp_path / name / "results"))
        return ["train", str(path), "tasks=[pathvqa, slake-vqarad]"], tmp_path / name

    words, root = command("whole")
    total = run(words, root, 0, tmp_path / "output")
    expected = bank_bytes(root / "tiny")
    assert len(expected) == 2 and total > 20
    chosen = range(1, total + 1) if TIMES > 1 else range(2, total, max(total // 4, 1))
    faults = []
    for number in chosen:
        words, root = command(f"killed-{number}")
        run(words, root, number, tmp_path / "output")
        at = (tmp_path / "output.events").read_text().splitlines()[-1]
        run(words, root, 0, tmp_path / "output")
        ledger = json.loads((root / "tiny" / "ledger.json").read_text())["tasks"]
        if bank_bytes(root / "tiny") != expected or list(ledger) != ["pathvqa", "slake-vqarad"]:
            faults.append(f"{number}: {at}")
    print(f"killed at {len(chosen)} of {total} events")
    assert not faults, f"{len(faults)} of {len(chosen)}:\n" + "\n".join(faults)
