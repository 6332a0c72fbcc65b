"""The run folder's ledger: what decided the run, which tasks are done, and the digest of each bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.io import STATISTICS, TASK_STATE, bank_size, load_bank
from mslora_cr.config.methods import load_method
from mslora_cr.config.run_files import BANK_WEIGHTS, CONFIG, LEDGER
from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.distributed.comm import broadcast_object, world_size
from mslora_cr.routing.lda import TaskStatistics, load_statistics
from mslora_cr.runs.differences import Finished, changed_settings
from mslora_cr.runs.entries import Answering, Forced, RunLedger, TaskEntry
from mslora_cr.runs.environment import environment
from mslora_cr.utils.files import file_digest, write_text
from mslora_cr.utils.regular import check_regular


def work_folder(run: Path, task: str) -> Path:
    """Return the folder for checkpoints inside a task, until the task is done."""
    return run / "work" / task


@dataclass
class Ledger:
    """A run folder: `read` it, `open` it before anything is written there, `enter` each finished task."""

    folder: Path
    content: RunLedger
    _verified: set[tuple[str, str]] = field(default_factory=set)
    """Bank files, with their digests, that match the ledger: each is hashed once."""

    @classmethod
    def read(cls, config: StreamConfig) -> Ledger:
        """Return the ledger of a configuration's run folder; an empty one if there is none yet. Nothing is written.

        Raises:
            StateError: `ledger.json` is damaged, or a later version wrote it.
        """
        content = RunLedger.read_if_there(config.run_dir / LEDGER)
        return cls(config.run_dir, content or RunLedger(run=config.run, method=config.method, tasks={}))

    @property
    def tasks(self) -> Mapping[str, TaskEntry]:
        """The finished tasks, in the order in which they were finished."""
        return self.content.tasks

    def open(self, config: StreamConfig, model_digest: str, force: bool) -> None:
        """Make the run folder this configuration's, and note in the ledger which differences `force` allowed.

        Raises:
            ConfigError: As `check_same_configuration`.
        """
        self.check_same_configuration(config, model_digest, force)
        begun = [
            task for task in config.stream if task.name in self.tasks or work_folder(self.folder, task.name).is_dir()
        ]
        changed = changed_settings(self.folder, config, begun[-1]) if begun and force else []
        changed += [f"the base model, on which {name!r} was trained" for name in self._other_bases(model_digest)]
        noted = self.content.forced
        if changed and force and changed not in [list(note.changed) for note in noted]:
            noted = (*noted, Forced(when=_now(), finished=tuple(self.tasks), changed=tuple(changed)))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        self._write({"config_digest": config.training_digest(), **environment()} | ({"forced": noted} if noted else {}))

    def check_same_configuration(
        self,
        config: StreamConfig,
        model_digest: str,
        force: bool,
        advice: str = "Choose another `run`, or pass --force to continue with this one",
    ) -> None:
        """Raise if finished tasks were trained otherwise; write nothing.

        A stream may grow: tasks after the finished ones are free.

        Args:
            model_digest: The digest of its base model.
            force: Allow differences that do not change finished tasks.
            advice: What the user can do instead.

        Raises:
            ConfigError: The finished tasks have another order, rank or method; or they were trained with other settings
                or on another base model, and `force` is not given. The message names the difference.
        """
        finished = Finished(self.folder, self.content)
        if fixed := finished.fixed_difference(config):
            raise ConfigError(
                f"{self.folder} has finished tasks of another stream ({fixed}), which not even --force changes. Choose "
                "another `run`"
            )
        differences = finished.difference(config) or next(
            (
                f"{name!r} was trained on a base model of other content than that in {config.model.path}"
                for name in self._other_bases(model_digest)
            ),
            "",
        )
        if differences and not force:
            raise ConfigError(f"{self.folder} was made with another configuration ({differences}). {advice}")

    def _other_bases(self, model_digest: str) -> list[str]:
        """Return the finished tasks that were trained on a base model of other content."""
        return [name for name, entry in self.tasks.items() if entry.model_digest not in (None, model_digest)]

    def bank_folder(self, task: str) -> Path:
        return self.folder / "banks" / task

    def done(self, task: str) -> bool:
        """Return whether a task is finished.

        Raises:
            BankError: Its bank is missing, or is not the recorded one.
        """
        entry = self.tasks.get(task)
        if entry is None:
            return False
        recorded = {BANK_WEIGHTS: entry.digest, TASK_STATE: entry.memory_digest}
        for name, digest in recorded.items():
            file = self.bank_folder(task) / name
            if digest is None or (str(file), digest) in self._verified:
                continue
            if not file.is_file() or file_digest(file) != digest:
                raise BankError(
                    f"{file} is not what the ledger records; restore it, or remove {task!r} from "
                    f"{self.folder / LEDGER} to train it again"
                )
            self._verified.add((str(file), digest))
        return True

    def task_state(self, task: str) -> dict[str, Tensor]:
        """Return the task state of a finished task; empty if there is none, or the task is not finished."""
        entry = self.tasks.get(task)
        return load_file(check_regular(self.bank_folder(task) / TASK_STATE)) if entry and entry.memory_digest else {}

    def statistics(self, task: str) -> TaskStatistics:
        """Return a task's router statistics, from the file beside its bank.

        Raises:
            BankError: The file is missing, or is not the recorded one.
        """
        file = self.bank_folder(task) / STATISTICS
        statistics = load_statistics(file.parent)
        entry = self.tasks.get(task)
        if entry and entry.router_digest not in (None, file_digest(file)):
            raise BankError(
                f"{file} is not what the ledger records; `mslora-cr bank fit-router CONFIG --task {task}` recreates it"
            )
        return statistics

    def banks(self, config: StreamConfig, tasks: list[Task]) -> list[Bank]:
        """Return the finished banks of these tasks.

        Raises:
            BankError: A task is not finished, or its bank has another rank than the configuration asks for, as far as
                the method's code is there to tell.
        """
        loaded = []
        for task in tasks:
            if not self.done(task.name):
                raise BankError(f"task {task.name!r} is not trained yet in {self.folder}; train it first")
            bank = load_bank(self.bank_folder(task.name))
            rank = bank_shape(config, task)[0] if config.knows_method else bank.rank
            if bank.rank != rank:
                raise BankError(f"bank {task.name!r} is of rank {bank.rank}, the configuration's is {rank}")
            loaded.append(bank)
        return loaded

    def enter(self, config: StreamConfig, task: Task, digest: str, **fields: Any) -> None:
        """Enter a task as finished, once its bank and all that belongs to it are in their folder.

        Args:
            digest: SHA-256 of the bank's weights.
            **fields: Further fields of its `TaskEntry`.
        """
        entry = TaskEntry(
            digest=digest,
            memory_digest=self._digest(task, TASK_STATE),
            router_digest=self._digest(task, STATISTICS),
            finished=_now(),
            stream=tuple(member.name for member in config.stream[: task.index + 1]),
            method=config.method,
            rank=config.lora.rank,
            processes=world_size(),
            parameters=bank_size(self.bank_folder(task.name)),
            **fields,
        )
        self._write({"tasks": {**self.tasks, task.name: entry}})

    def note_answering(self, answering: Answering) -> None:
        """Record which banks answer, for readers without the method's code."""
        self._write({"answering": answering})

    def note_router(self, task: Task) -> None:
        """Record a finished task's new router statistics; do nothing for other tasks."""
        if task.name in self.tasks:
            entry = self.tasks[task.name].model_copy(update={"router_digest": self._digest(task, STATISTICS)})
            self._write({"tasks": {**self.tasks, task.name: entry}})

    def share(self) -> None:
        """Give every rank the first rank's ledger: a shared file system may show other hosts an older one."""
        self.content = broadcast_object(self.content)

    def _digest(self, task: Task, name: str) -> str | None:
        file = self.bank_folder(task.name) / name
        return file_digest(file) if file.is_file() else None

    def _write(self, changes: Mapping[str, Any]) -> None:
        self.content = self.content.model_copy(update=changes)
        self.content.write(self.folder / LEDGER)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def bank_shape(config: StreamConfig, task: Task) -> tuple[int, float]:
    """Rank and alpha of a task's stored bank; alpha grows with the rank."""
    rank = load_method(config.method).bank_rank(config.lora.rank, task.index + 1)
    return rank, config.lora.alpha * (rank // config.lora.rank)


def finished_banks(config: StreamConfig) -> dict[str, Bank]:
    """Return the banks that the run folder's ledger records, by task."""
    ledger = Ledger.read(config)
    done = [task for task in config.stream if ledger.done(task.name)]
    return {task.name: bank for task, bank in zip(done, ledger.banks(config, done), strict=True)}
