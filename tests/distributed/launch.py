"""Start the command as a user does, with real processes, and compare what runs leave on disk.

Two ways: `run` starts a launcher with its own command line; `launch` and `start` run torchrun's own agent in a process
forked from a server that has imported everything, and its ranks are forked from it, which saves most of the time.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import mkstemp
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401  (imported once, by the server)
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.multiprocessing.spawn import _prctl_pr_set_pdeathsig

import mslora_cr.evaluation.evaluate
import mslora_cr.stream.train  # noqa: F401
from mslora_cr.cli.main import main

ROOT = Path(__file__).parents[2]
STAGES = ("ddp", "zero1", "zero2", "zero3")
TIMEOUT = 240
"""Seconds after which a run counts as hanging."""
BOUND = 60
"""Seconds within which the processes of a broken run must have ended, on a busy machine too."""
ZEROED = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
gc.freeze()  # in the server: its ranks' collections, three a task, then pass over what was imported


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


def run(*command: str | Path, **variables: str) -> str:
    """Run a command from the repository as a user does, and expect success; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


class Launch:
    """A launcher that runs, and its ranks."""

    def __init__(self, process: BaseProcess, output: Path) -> None:
        self.process, self._output = process, output

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> list[int]:
        """Process ids, in the order of ranks."""
        return sorted(children(self.pid))

    def finish(self, timeout: float = TIMEOUT) -> tuple[int, str]:
        """Exit status and output; a process that is still there after the timeout is killed, and fails the test."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            for pid in [*self.ranks(), self.pid]:
                os.kill(pid, 9)
            raise AssertionError(f"still running after {timeout} s:\n{self.output[-4000:]}")
        return self.process.exitcode, self.output


def start(
    command: Sequence[str | Path], processes: int = 2, before: Callable[[], None] | None = None, restarts: int = 0
) -> Launch:
    """`mslora-cr COMMAND` in so many processes under torchrun's agent.

    Args:
        before: called in each rank first, to plant a fault; a function of a module.
        restarts: how often the agent starts all ranks again after one has failed.
    """
    descriptor, output = mkstemp(suffix=".output")
    os.close(descriptor)
    process = _CONTEXT.Process(target=_agent, args=(list(map(str, command)), processes, before, restarts, output))
    process.start()
    return Launch(process, Path(output))


def _agent(command: list[str], processes: int, before: Callable[[], None] | None, restarts: int, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--rdzv_id", output]
    options = [*rendezvous, "--nproc_per_node", str(processes), "--max_restarts", str(restarts)]
    config, _, _ = config_from_args(parse_args([*options, "unused"]))
    config.start_method = "fork"
    try:
        elastic_launch(config, entrypoint=_rank)(command, before)
    except ChildFailedError as error:
        sys.exit(str(error))


def _rank(command: list[str], before: Callable[[], None] | None) -> None:
    _prctl_pr_set_pdeathsig(0)  # torchrun's own ranks get no signal when it is killed
    if before is not None:
        before()
    sys.exit(main(command))


def launch(command: Sequence[str | Path], processes: int = 2, before: Callable[[], None] | None = None) -> str:
    """Start, wait, and expect success; the output."""
    status, output = start(command, processes, before).finish()
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
        assert expected and [row.keys() for row in steps] == [row.keys() for row in expected]
        for row, wanted in zip(steps, expected, strict=True):
            for name, value in wanted.items():
                assert abs(row[name] - value) <= tolerance * abs(value), (task, wanted["step"], name, row[name], value)
        files = (run / "banks" / task / "adapter_model.safetensors" for run in (ours, theirs))
        away = deviation(*map(load_file, files))
        assert away <= tolerance, f"bank {task} is {away:.1e} away"
