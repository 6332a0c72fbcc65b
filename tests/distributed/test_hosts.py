"""Two hosts, each a network namespace of this machine; one is lost, and the same lines go on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import bank_bytes, first_in_make_test, write_config
from tests.distributed.conftest import TWO_TASKS
from tests.distributed.launch import BOUND, ROOT, deepspeed_file, run, wait_until

NAMES = [f"mslora-{os.getpid()}-{number}" for number in (0, 1)]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
SILENCE = 8
"""Seconds without a sign of life after which a host counts as lost: `training.ddp_timeout`, which shortens it."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces with a cable between them, `eth0` at both ends."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need network namespaces: there is no `ip` command here")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield NAMES
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need the right to make network namespaces: {error.stderr.strip()}")
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Hosts:
    """The same command on both hosts, each with one process."""

    def __init__(self, names: list[str], command: list[str | Path], output: Path) -> None:
        self.processes = []
        self.outputs = [output.with_suffix(f".{number}") for number in (0, 1)]
        for number, name in enumerate(names):
            line = ["bash", "scripts/launch_multinode.sh", *map(str, command), "--hosts", "2", "--master", ADDRESSES[0]]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            self.processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *line, "--interface", "eth0", "--host-rank", str(number)],
                    stdout=self.outputs[number].open("w"),
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment,
                )
            )

    def text(self, number: int) -> str:
        return self.outputs[number].read_text(encoding="utf-8", errors="replace")

    def kill(self, number: int) -> None:
        """End all processes of a host at once, as when its power is cut."""
        top = psutil.Process(self.processes[number].pid)
        for process in [top, *top.children(recursive=True)]:
            process.kill()

    def finish(self, number: int) -> int:
        return self.processes[number].wait(BOUND)


@pytest.mark.parametrize("launcher", first_in_make_test("torchrun", "deepspeed"))
def test_a_lost_host_ends_the_run_and_the_same_lines_go_on(
    launcher: str,
    hosts: list[str],
    whole: Callable[[str], dict[str, bytes]],
    tiny_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """torchrun's host is cut off the network, so that nothing tells the other; DeepSpeed's is switched off.

    They start with a line on each host, and resume with one line for all: under Slurm, and by pdsh.
    """
    folder = tmp_path / "checkpoints" / "tiny"
    stage = {"torchrun": "ddp", "deepspeed": "zero2"}[launcher]
    config = write_config(tmp_path, tiny_settings)
    command: list[str | Path] = ["train", config, TWO_TASKS, f"training.ddp_timeout={SILENCE}"]
    command += deepspeed_file(stage, tmp_path)
    if launcher == "deepspeed":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        command += ["--hostfile", hostfile]

    pair = Hosts(hosts, command, tmp_path / "first")
    log = folder / "logs" / "pathvqa.jsonl"
    wait_until(lambda: (log.is_file() and log.read_text().count("\n") > 2) or pair.processes[0].poll() is not None)
    if launcher == "torchrun":
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        assert pair.finish(1) != 0
        ip("-n", hosts[1], "link", "set", "eth0", "up")
        assert "rank 0 gives no sign of life: its host or the network is lost" in pair.text(1), pair.text(1)[-4000:]
    else:
        pair.kill(1)
    assert pair.finish(0) != 0
    lost = ("rank 1 gives no sign of life", "another process of this run ended")
    assert any(message in pair.text(0) for message in lost), pair.text(0)[-4000:]

    resume = run_under_slurm if launcher == "torchrun" else run_by_pdsh
    resume(hosts, command, tmp_path)
    assert bank_bytes(folder) == whole(stage)


def on_path(folder: Path, stubs: dict[str, list[str]]) -> str:
    """A PATH on which shell scripts of these lines stand for commands."""
    for name, body in stubs.items():
        (folder / name).write_text("\n".join(["#!/usr/bin/env bash", "set -e", *body]) + "\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_under_slurm(hosts: list[str], command: list[str | Path], folder: Path) -> None:
    """The batch script, with Slurm's two commands played by shell scripts: `srun` starts its line on both hosts."""
    lines = [f'SLURM_NODEID={number} ip netns exec {name} "${{@:2}}" & pids+=($!)' for number, name in enumerate(hosts)]
    stubs = {
        "scontrol": [f"printf '%s\\n' {' '.join(ADDRESSES)}"],
        "srun": ["pids=()", *lines, 'for pid in "${pids[@]}"; do wait "$pid"; done'],
    }
    path = on_path(folder, stubs)
    job = {"SLURM_JOB_NODELIST": "two hosts", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    run("bash", "scripts/slurm.sbatch", *command, PATH=path, INTERFACE="eth0", DS_ACCELERATOR="cpu", **job)


def run_by_pdsh(hosts: list[str], command: list[str | Path], folder: Path) -> None:
    """One line on the first host, with `pdsh` and `ssh` played by shell scripts that enter a host's namespace.

    As a remote shell has it, there is nothing of the caller's environment but what DeepSpeed sends.
    """
    shell = 'env -i HOME="$HOME" PATH="$PATH" bash -c'
    lines = [f'ip netns exec {name} {shell} "${{line//%n/{number}}}" & pids+=($!)' for number, name in enumerate(hosts)]
    cases = [f"{address}) name={name} ;;" for address, name in zip(ADDRESSES, hosts, strict=True)]
    stubs = {
        "ssh": [
            "while [[ $1 == -* ]]; do shift 2; done",
            f"case $1 in {' '.join(cases)} esac",
            f'ip netns exec "$name" {shell} "${{*:2}}"',
        ],
        "pdsh": [
            f'[[ "${{*:1:5}}" == "-S -f 1024 -w {",".join(ADDRESSES)}" ]]',
            'line="${*:6}" pids=()',
            *lines,
            'for pid in "${pids[@]}"; do wait "$pid"; done',
        ],
    }
    path = on_path(folder, stubs)
    sent = folder / "environment"
    sent.write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")  # docs/how-to/distributed.md, known traps
    script = ["ip", "netns", "exec", hosts[0], "bash", "scripts/launch_multinode.sh", *command]
    run(*script, PATH=path, DS_ENV_FILE=str(sent), DS_ACCELERATOR="cpu")
