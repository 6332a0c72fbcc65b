"""The environment of a result: package versions, git commit, hardware; and a check that all hosts have the same."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mslora_cr.distributed.comm import assert_same_on_all_ranks, assert_shared_fs

PACKAGES = ("mslora-cr", "torch", "transformers", "peft", "accelerate", "deepspeed", "tokenizers")


def environment() -> dict[str, Any]:
    """Return the environment of a result: package versions, git commit of the code, hardware."""
    return {"versions": versions(), "git": _git(), "hardware": _hardware()}


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _git() -> dict[str, Any] | None:
    folder = str(Path(__file__).parent)
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(status.strip())}


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def check_hosts(output: Path, facts: Mapping[str, Any]) -> None:
    """Check that all ranks work on the same inputs and write to the same folder; every rank learns the result.

    Raises:
        DistributedError: On every rank; the message names the difference.
    """
    assert_same_on_all_ranks({**facts, "the package versions": versions()})
    assert_shared_fs(output)
