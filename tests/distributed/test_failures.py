"""Killed, broken or out of space: all ranks end soon and say why, and the same command goes on to the same banks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import bank_bytes, first_in_make_test, write_config
from tests.distributed import faults
from tests.distributed.conftest import TWO_TASKS
from tests.distributed.launch import BOUND, ROOT, Launch, alive, deepspeed_file, launch, start, wait_until

STEPS = 4
"""Optimizer steps a task; a checkpoint is written every second one."""


class Stream:
    """A run of two tasks that is started again and again."""

    def __init__(self, folder: Path, settings: dict[str, Any], stage: str, *overrides: str) -> None:
        config = write_config(folder, settings)
        self.run = folder / "checkpoints" / "tiny"
        self.command = ["train", config, TWO_TASKS, *deepspeed_file(stage, folder), *overrides]

    def steps(self) -> int:
        """How many optimizer steps the logs tell of."""
        return sum(file.read_text().count("\n") for file in self.run.glob("logs/*.jsonl"))

    def start_until(self, step: int, checkpoint: str | None = None) -> Launch:
        """Start two processes and return when the logs tell of that step, and a checkpoint has its name."""
        launched = start(self.command)

        def there() -> bool:
            return self.steps() >= step and checkpoint in (None, *self.checkpoints())

        wait_until(lambda: there() or launched.process.exitcode is not None, pause=0.001)
        assert launched.process.exitcode is None, launched.output[-4000:]
        return launched

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.run.glob("work/*/*"))


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3", "zero1", "zero2"))
def test_killed_broken_and_killed_again(
    stage: str, tiny_settings: dict[str, Any], tmp_path: Path, whole: Callable[[str], dict[str, bytes]]
) -> None:
    """One command: a rank is killed, then the disk is full, then the launcher is killed, then it ends."""
    stream = Stream(tmp_path, tiny_settings, stage)
    moments = random.randint(1, STEPS - 1), random.randint(STEPS + 1, 2 * STEPS - 1)
    print("killed at steps", moments)  # shown if the test fails

    launched = stream.start_until(moments[0])
    os.kill(launched.ranks()[random.randint(0, 1)], signal.SIGKILL)
    status, output = launched.finish(BOUND)
    assert status == 1
    assert "Signal 9 (SIGKILL)" in output or "another process of this run ended" in output

    before = [name for name in stream.checkpoints() if name.startswith("checkpoint")]
    status, output = start(stream.command, before=faults.full_disk).finish(BOUND)
    assert status == 1
    assert output.count("mslora-cr: error on rank") == 1, output[-4000:]
    assert "cannot be written" in output and "What was complete before is kept" in output, output[-4000:]
    assert [name for name in stream.checkpoints() if name.startswith("checkpoint")] == before[-1:]

    launched = stream.start_until(moments[1])
    ranks = launched.ranks()
    os.kill(launched.pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(rank) for rank in ranks), BOUND)
    assert launched.output.count("the launcher ended") == 1, launched.output[-4000:]

    launch(stream.command)
    assert bank_bytes(stream.run) == whole(stage)
    assert not stream.checkpoints()


def test_killed_in_the_second_epoch(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """It goes on with the second epoch's order, of which each rank has taken its share."""
    settings = ("tasks=[pathvqa]", "tasks.*.epochs=2")
    whole, stream = (Stream(tmp_path / name, tiny_settings, "ddp", *settings) for name in ("whole", "killed"))
    launch(whole.command)
    launched = stream.start_until(2 * STEPS - 1, f"checkpoint-{2 * STEPS - 2}")
    os.kill(launched.ranks()[1], signal.SIGKILL)
    launched.finish(BOUND)
    assert [name for name in stream.checkpoints() if not name.startswith(".saving")] == [f"checkpoint-{2 * STEPS - 2}"]
    launch(stream.command)
    assert bank_bytes(stream.run) == bank_bytes(whole.run)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["ddp", "zero2"])
def test_killed_while_the_projector_is_trained(stage: str, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """In the second task, which begins from the projector of the first."""
    settings = ("method=sequential", "lora.projector_learning_rate=1e-3")
    whole, stream = (Stream(tmp_path / name, tiny_settings, stage, *settings) for name in ("whole", "killed"))
    launch(whole.command)
    launched = stream.start_until(2 * STEPS - 1, "checkpoint-2")
    os.kill(launched.ranks()[1], signal.SIGKILL)
    launched.finish(BOUND)
    launch(stream.command)
    assert (resumed := bank_bytes(stream.run)) == bank_bytes(whole.run)
    assert all(b"multi_modal_projector" in content for content in resumed.values())


def test_another_number_of_processes_inside_a_task(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """It is refused, and allowed between tasks; one checkpoint is kept, whole and under its name."""
    stream = Stream(tmp_path, tiny_settings, "zero2")
    launched = stream.start_until(STEPS - 1, "checkpoint-2")
    os.kill(launched.ranks()[1], signal.SIGKILL)
    launched.finish(BOUND)
    assert [name for name in stream.checkpoints() if not name.startswith(".saving")] == ["checkpoint-2"]
    status, output = start(stream.command, processes=1).finish(BOUND)
    assert status == 1
    assert "was written with processes 2, ZeRO stage 2; this run has processes 1, ZeRO stage 2" in output
    shutil.rmtree(stream.run / "work" / "pathvqa")  # as the message says
    launch(stream.command, processes=1)
    assert bank_bytes(stream.run).keys() == {"pathvqa", "slake-vqarad"}


@pytest.mark.parametrize("stage", first_in_make_test("zero3", "ddp"))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faults.exception_on_rank_1, "error on rank 1: ZeroDivisionError('planted')"),
        (
            faults.nan_on_rank_1,
            "error on rank 1: tiny/pathvqa: the loss at step 2 is nan; nothing was updated. The batch:",
        ),
    ],
)
def test_an_error_on_one_rank_stops_all(
    fault: Callable[[], None], message: str, stage: str, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    stream = Stream(tmp_path, tiny_settings, stage, "training.save_steps=1")
    status, output = start(stream.command, before=fault).finish(BOUND)
    assert status == 1
    assert output.count("mslora-cr: error") == output.count(message) == 1, output[-4000:]
    assert output.count("ZeroDivisionError: planted") == (1 if "planted" in message else 0)  # a traceback's last line
    assert stream.steps() == 1  # nothing moved at the second
    assert [name for name in stream.checkpoints() if not name.startswith(".saving")] == ["checkpoint-1"]


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3"))
def test_an_image_that_breaks_during_training_stops_all(
    stage: str, tiny_settings: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    for rank in ("0", "1"):
        shutil.copytree(tiny_data, tmp_path / rank / "data")
    stream = Stream(tmp_path, tiny_settings, stage, "data.root=data", "training.save_steps=1")
    status, output = start(stream.command, before=partial(faults.broken_images_on_rank_1, tmp_path)).finish(BOUND)
    assert status == 1
    assert output.count("mslora-cr: error") == output.count("not a readable image") == 1, output[-4000:]
    assert "mslora-cr: error on rank 1: data/PathVQA/train.json: record " in output
    assert 1 <= stream.steps() < STEPS


def test_a_wrong_record_stops_all(tiny_settings: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    images = sorted((data / "PathVQA").rglob("*.jpg")) or sorted((data / "PathVQA").rglob("*.png"))
    for image in images:
        image.write_bytes(b"no image")
    stream = Stream(tmp_path, tiny_settings, "zero1", f"data.root={data}")
    status, output = start(stream.command).finish(BOUND)
    assert status == 1
    assert output.count("mslora-cr: error on rank") == 1, output[-4000:]
    assert "PathVQA" in output


def test_a_run_folder_that_cannot_be_made(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stream = Stream(tmp_path, tiny_settings, "ddp", f"output_dir={tmp_path / 'file' / 'runs'}")
    status, output = start(stream.command).finish(BOUND)
    assert status == 1
    message = f"mslora-cr: error on rank 0: [Errno 20] Not a directory: '{tmp_path / 'file' / 'runs' / 'tiny'}'"
    assert output.count("mslora-cr: error") == output.count(message) == 1, output[-4000:]


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """Where checkpoints inside a task go, as a file system of its own."""
    folder = tmp_path / "checkpoints" / "tiny" / "work"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a folder that root cannot write needs the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3"))
def test_a_folder_that_becomes_read_only(
    stage: str,
    mount_point: Path,
    whole: Callable[[str], dict[str, bytes]],
    tiny_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """In the second task, before its first checkpoint."""
    stream = Stream(tmp_path, tiny_settings, stage)
    status, output = start(stream.command, before=partial(faults.read_only, mount_point, STEPS + 1)).finish(BOUND)
    assert status == 1
    message = f": {mount_point / 'slake-vqarad' / '.saving'}-"  # all ranks run into it
    assert output.count("mslora-cr: error") == output.count(message) == 1, output[-4000:]
    assert "Read-only file system" in output and "What was complete before is kept" in output
    assert stream.steps() == STEPS + 2 and bank_bytes(stream.run).keys() == {"pathvqa"}

    subprocess.run(["mount", "-o", "remount,bind,rw", mount_point], check=True)
    launch(stream.command)
    assert bank_bytes(stream.run) == whole(stage)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=data", "rank 1 and rank 0 differ in the training records"),
        ("output_dir=runs", "runs/tiny is not shared: what rank 0 writes there does not appear on rank 1"),
    ],
)
def test_hosts_that_see_different_files_are_refused(
    override: str, message: str, tiny_settings: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    for rank in ("0", "1"):
        shutil.copytree(tiny_data, tmp_path / rank / "data")
    records = tmp_path / "1" / "data" / "PathVQA" / "train.json"
    records.write_text(json.dumps(json.loads(records.read_text())[1:]))
    stream = Stream(tmp_path, tiny_settings, "ddp", override)
    status, output = start(stream.command, before=partial(faults.folder_of_its_own, tmp_path)).finish(BOUND)
    assert status == 1
    assert output.count("mslora-cr: error") == output.count(message) == 1, output[-4000:]


@pytest.mark.parametrize("launcher", first_in_make_test("deepspeed", "torchrun"))
def test_a_killed_launcher_of_the_users_own(launcher: str, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """DeepSpeed's has two processes; without the upper one the lower one would go on."""
    stream = Stream(tmp_path, tiny_settings, "ddp")
    script = ["bash", "scripts/launch.sh", *map(str, stream.command), "--gpus", "2", "--launcher", launcher]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    wait_until(lambda: stream.steps() >= 1 or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    output, _ = process.communicate(timeout=BOUND)  # until the last of them has closed it
    assert len(family) >= 2
    wait_until(lambda: not any(alive(member.pid) for member in family), BOUND)
    assert output.count("the launcher ended, so this run stops") == 1, output[-4000:]
