"""The run folder's ledger: what made the run, which tasks are done, and the digest of each bank."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.io import TASK_STATE, WEIGHTS, load_bank
from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.utils.files import file_digest, write_json

PACKAGES = ("mslora-cr", "torch", "transformers", "peft", "accelerate", "deepspeed", "tokenizers")


def environment() -> dict[str, Any]:
    """What made a result: package versions, git commit of the code, hardware."""
    return {"versions": versions(), "git": _git(), "hardware": _hardware()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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


@dataclass
class Ledger:
    """A run folder: `read` it, `open` it before anything is written there, `record` each finished task."""

    folder: Path
    content: dict[str, Any]
    _verified: set[tuple[str, str]] = field(default_factory=set)
    """Files of banks, with their digests, that were found to be what is recorded: a bank is hashed once."""

    @classmethod
    def read(cls, config: StreamConfig) -> Ledger:
        """The ledger of a configuration's run folder, empty if there is none yet. Writes nothing.

        Raises:
            ConfigError: `ledger.json` is damaged.
        """
        path = config.run_dir / "ledger.json"
        if not path.is_file():
            return cls(config.run_dir, {"run": config.run, "method": config.method, "tasks": {}})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["tasks"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is damaged ({error!r}); restore it, or move {config.run_dir} away to start again"
            ) from None
        return cls(config.run_dir, content)

    def open(self, config: StreamConfig, model_digest: str, force: bool) -> None:
        """Make the run folder this configuration's.

        Raises:
            ConfigError: as `check_same_configuration`.
        """
        self.check_same_configuration(config, model_digest, force)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        )
        self.content.update(config_digest=config.training_digest(), **environment())
        self._write()

    def check_same_configuration(
        self,
        config: StreamConfig,
        model_digest: str,
        force: bool,
        advice: str = "Choose another `run`, or pass --force to continue with this one",
    ) -> None:
        """Raise if finished tasks were trained otherwise. Writes nothing.

        Args:
            advice: what the user can do instead.

        Raises:
            ConfigError: they were, and `force` is not given; what differs is named.
        """
        differences = self.differences(config, model_digest)
        if differences and not force:
            raise ConfigError(f"{self.folder} was made with another configuration ({differences}). {advice}")

    def differences(self, config: StreamConfig, model_digest: str) -> str:
        """What sets finished tasks apart from those that this configuration would train; empty if nothing does.

        A stream may grow: tasks behind the finished ones are free.
        """
        stream = {task.name: task for task in config.stream}
        for name, entry in reversed(self.content["tasks"].items()):  # the last one's configuration holds the others'
            if name not in stream:
                return f"{name!r} is finished there, and not a task here"
            if entry.get("config_digest") not in (None, config.training_digest(stream[name])):
                # A launch with --force has put its own settings into config.yaml.
                forced = f"{name!r} was trained with other settings, by --force"
                return self._changed_keys(config, stream[name]) or forced
            if entry.get("model_digest") not in (None, model_digest):
                return f"{name!r} was trained on a base model of other content than that in {config.model.path}"
        return ""

    def _changed_keys(self, config: StreamConfig, task: Task) -> str:
        try:
            old = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
            before = _flat(StreamConfig.model_validate(old).fingerprint_fields(task))
        except (OSError, yaml.YAMLError, ValidationError):
            return "its config.yaml is gone or damaged"
        now = _flat(config.fingerprint_fields(task))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in changed[:6])

    def bank_folder(self, task: str) -> Path:
        return self.folder / "banks" / task

    def done(self, task: str) -> bool:
        """Whether a task is finished.

        Raises:
            BankError: its bank is gone or not the one that was recorded.
        """
        entry = self.content["tasks"].get(task)
        if entry is None:
            return False
        recorded = {WEIGHTS: entry["digest"]}
        if entry.get("memory_digest"):
            recorded[TASK_STATE] = entry["memory_digest"]
        for name, digest in recorded.items():
            file = self.bank_folder(task) / name
            if (str(file), digest) in self._verified:
                continue
            if not file.is_file() or file_digest(file) != digest:
                raise BankError(
                    f"{file} is not what the ledger records; restore it, or remove {task!r} from "
                    f"{self.folder / 'ledger.json'} to train it again"
                )
            self._verified.add((str(file), digest))
        return True

    def task_state(self, task: str) -> dict[str, Tensor]:
        """What the method kept of a finished task; empty if that is nothing, or the task is not finished."""
        entry = self.content["tasks"].get(task, {})
        return load_file(self.bank_folder(task) / TASK_STATE) if entry.get("memory_digest") else {}

    def banks(self, config: StreamConfig, tasks: list[Task]) -> list[Bank]:
        """The finished banks of these tasks.

        Raises:
            BankError: one is not finished, or of another rank than the configuration's.
        """
        loaded = []
        for task in tasks:
            if not self.done(task.name):
                raise BankError(f"task {task.name!r} is not trained yet in {self.folder}; train it first")
            bank = load_bank(self.bank_folder(task.name))
            if bank.rank != config.lora.rank:
                raise BankError(f"bank {task.name!r} is of rank {bank.rank}, the configuration's is {config.lora.rank}")
            loaded.append(bank)
        return loaded

    def record(self, task: str, entry: dict[str, Any]) -> None:
        self.content["tasks"][task] = entry
        self._write()

    def _write(self) -> None:
        write_json(self.folder / "ledger.json", self.content)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
    if isinstance(node, list):
        named = [
            (item.get("name", index) if isinstance(item, dict) else index, item) for index, item in enumerate(node)
        ]
        return {key: value for name, child in named for key, value in _flat(child, f"{prefix}{name}.").items()}
    return {prefix[:-1]: node}


def finished_banks(config: StreamConfig) -> dict[str, Bank]:
    """The banks that the run folder's ledger records, by task."""
    ledger = Ledger.read(config)
    done = [task for task in config.stream if ledger.done(task.name)]
    return {task.name: bank for task, bank in zip(done, ledger.banks(config, done), strict=True)}
