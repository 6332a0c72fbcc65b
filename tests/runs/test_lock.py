"""One writer per folder: the second is refused by name, and nothing is left when the first is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mslora_cr.runs import lock
from mslora_cr.runs.lock import LockedError, Writer, one_writer

HOLD = """
import sys, time
from pathlib import Path
from mslora_cr.runs.lock import one_writer
with one_writer(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, how: str = "alone") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", "import os\n" + HOLD, str(folder), how], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_second_is_refused_and_a_killed_one_is_gone_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = hold(folder, "fork")  # a worker that outlives its process keeps nothing
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LockedError, match=rf"process {first.pid} on .+, since 20..-.*T.* \(mslora-cr") as refused:
        one_writer(folder).__enter__()
    assert len(str(refused.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    first.kill()
    first.wait()
    with one_writer(folder):
        pass
    end(first)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_it_holds_within_a_process_and_leaves_nothing(tmp_path: Path) -> None:
    with one_writer(tmp_path / "new" / "run"):
        with pytest.raises(LockedError, match="by this process"), one_writer(tmp_path / "new" / "run"):
            pass
        (tmp_path / "new" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["file"]
    with one_writer(tmp_path / "empty" / "run"):
        pass
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("lives", [True, False])
def test_a_writer_on_another_host_counts_while_it_gives_signs_of_life(
    lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.6)
    other = Writer(host="node7", boot="another", pid=5, since="2026-01-01T00:00:00+00:00", command="mslora-cr train x")
    other.write(tmp_path / ".writer.json")
    monkeypatch.setattr(time, "sleep", lambda _: _sign_of_life(other, tmp_path) if lives else None)
    if lives:
        with pytest.raises(LockedError, match="process 5 on node7"), one_writer(tmp_path):
            pass
    else:
        with one_writer(tmp_path):
            pass


def _sign_of_life(writer: Writer, folder: Path) -> None:
    writer.model_copy(update={"beat": writer.beat + 1}).write(folder / ".writer.json")
