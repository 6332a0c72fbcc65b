"""Start the command as a user does, with real processes, and compare what runs leave on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STAGES = ("ddp", "zero1", "zero2", "zero3")
TIMEOUT = 240
"""Seconds after which a run counts as hanging."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ZEROED = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")


def deepspeed_file(stage: str, folder: Path) -> list[str]:
    """The override that names a shipped DeepSpeed file, so changed that tiny tensors are sharded too; none for DDP."""
    if stage == "ddp":
        return []
    config = json.loads((ROOT / "configs" / "deepspeed" / f"{stage}.json").read_text(encoding="utf-8"))
    for name in ZEROED if stage.startswith("zero3") else ():
        assert f"stage3_{name}" in config["zero_optimization"]
        config["zero_optimization"][f"stage3_{name}"] = 0
    path = folder / f"{stage}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return [f"training.deepspeed={path}"]


def start(
    command: Sequence[str | Path], processes: int = 2, module: str = "mslora_cr", **variables: str
) -> subprocess.Popen[str]:
    """`mslora-cr COMMAND` in so many processes under torchrun; standard output and error come together."""
    line = [*TORCHRUN, str(processes), "-m", module, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> tuple[int, str]:
    """Exit status and output; a process that is still there after the timeout is killed, and fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output[-4000:]}") from None
    return process.returncode, output


def launch(command: Sequence[str | Path], processes: int = 2, module: str = "mslora_cr", **variables: str) -> str:
    """Start, wait, and expect success; the output."""
    status, output = finish(start(command, processes, module, **variables))
    assert status == 0, output[-6000:]
    return output


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Any, timeout: float = TIMEOUT, pause: float = 0.01) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not asked for its status does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def logged(run_folder: Path, task: str) -> list[dict[str, float]]:
    lines = (run_folder / "logs" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def deviation(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """‖a - b‖ / ‖b‖ over all matrices of a bank."""
    assert ours.keys() == theirs.keys()
    flat_ours, flat_theirs = (torch.cat([bank[key].flatten().double() for key in theirs]) for bank in (ours, theirs))
    return ((flat_ours - flat_theirs).norm() / flat_theirs.norm()).item()


def compare_runs(ours: Path, theirs: Path, tasks: Sequence[str], tolerance: float = 1e-5) -> None:
    """Every logged term at every step, and every final bank, to a relative tolerance."""
    for task in tasks:
        steps, expected = logged(ours, task), logged(theirs, task)
        assert [row.keys() for row in steps] == [row.keys() for row in expected]
        for row, wanted in zip(steps, expected, strict=True):
            for name, value in wanted.items():
                assert abs(row[name] - value) <= tolerance * abs(value), (task, wanted["step"], name, row[name], value)
        files = (run / "banks" / task / "adapter_model.safetensors" for run in (ours, theirs))
        away = deviation(*map(load_file, files))
        assert away <= tolerance, f"bank {task} is {away:.1e} away"
