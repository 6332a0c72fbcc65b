"""The public interface behind `import mslora_cr`. Each name is loaded on first use, so the import itself is light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mslora_cr.banks import io
from mslora_cr.banks.bank import Bank, BankError, sum_banks
from mslora_cr.banks.stack import merge_banks
from mslora_cr.config.find import find_run
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.records import DataError
from mslora_cr.evaluation.cells import Stages
from mslora_cr.models.layout import ModelError
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.serving.answering import Answer, AnsweringModel, ImageSource
from mslora_cr.utils.errors import UserError

if TYPE_CHECKING:
    from mslora_cr.analysis.tables import Results

__all__ = [
    "Answer",
    "AnsweringModel",
    "Bank",
    "BankError",
    "ConfigError",
    "DataError",
    "ImageSource",
    "ModelError",
    "Results",
    "StreamConfig",
    "UserError",
    "banks_of",
    "evaluate",
    "load",
    "load_bank",
    "load_config",
    "merge_banks",
    "read_results",
    "save_bank",
    "sum_banks",
    "train",
]

Run = str | Path | StreamConfig
"""A run: a configuration, its file, its run folder, or its name below `checkpoints/`."""


def train(run: Run, task: str | None = None, overrides: Sequence[str] = (), force: bool = False) -> Path:
    """Train a stream, task by task, like `mslora-cr train`; return the run folder.

    Finished tasks are not trained again, and an interrupted task resumes.

    Args:
        run: The run.
        task: Train only this task.
        overrides: `key.path=value`, as on the command line.
        force: Continue in a run folder that another configuration made.

    Raises:
        ConfigError, DataError, ModelError, BankError: Before anything is trained.
    """
    # It imports PEFT and transformers' trainer, which answers do not need.
    from mslora_cr.stream import train as stream

    config = _config(run, overrides)
    stream.train(config, only=() if task is None else (task,), force=force)
    return config.run_dir


def evaluate(run: Run, stages: Stages | None = None, task: str | None = None, overrides: Sequence[str] = ()) -> Results:
    """Answer and score the test questions of a run, like `mslora-cr evaluate`; existing answers are kept.

    Args:
        run: The run.
        stages: `own`, `final`, `seen` or `all`; the default is `own`, or `final` for routed questions.
        task: Evaluate only this task.
        overrides: `key.path=value`, as on the command line.

    Raises:
        ConfigError, DataError, ModelError, BankError: Before anything is answered.
    """
    from mslora_cr.analysis.tables import read_results_folder
    from mslora_cr.evaluation import evaluate as task_aware  # Scoring needs the extra `eval`, answering does not.
    from mslora_cr.evaluation import routed as task_agnostic

    config = _config(run, overrides)
    if config.evaluation.banks_by == "routed":
        if task is not None:
            raise ConfigError("a routed evaluation mixes the questions of all tasks; leave `task` out")
        path = task_agnostic.evaluate_routed(config, stages or "final")
    else:
        path = task_aware.evaluate(config, stages or "own", task)
    return read_results_folder(path.parent)


def read_results(run: Run) -> Results:
    """Read the results of an evaluated run as tables.

    Raises:
        ReportError: The run is not evaluated.
    """
    from mslora_cr.analysis.tables import read_results_folder

    return read_results_folder(_config(run).results_run_dir)


def load(run: Run, task: str | None = None, stage: int | None = None, overrides: Sequence[str] = ()) -> AnsweringModel:
    """Load a trained run to answer questions: `load(run, task="derm").answer("photo.jpg", "Which condition is this?")`.

    Args:
        run: The run.
        task: The task whose banks answer; None lets the run's router choose for each question.
        stage: The stage of the stream, from 1; None takes the last trained one, 0 the base model alone.
        overrides: `key.path=value`, for instance `model.device=cpu`.

    Raises:
        ConfigError, BankError, ModelError: The run cannot answer like that.
    """
    return AnsweringModel(_config(run, overrides), task, stage)


def banks_of(run: Run) -> dict[str, Bank]:
    """Return a run's finished banks by task, in the stream's order.

    Raises:
        BankError: A bank is not the one that the run's ledger records.
    """
    return finished_banks(_config(run))


def load_bank(path: str | Path) -> Bank:
    """Load a bank from a PEFT adapter's folder, a published checkpoint's folder, or its `cl_lora.bin`.

    Raises:
        BankError: There is none.
    """
    return io.load_bank(Path(path))


def save_bank(bank: Bank, folder: str | Path) -> str:
    """Write a bank as a PEFT adapter, whole or not at all; return the SHA-256 of its weights.

    Raises:
        BankError: Some of its numbers are not finite.
    """
    return io.save_bank(bank, Path(folder))


def __getattr__(name: str) -> Any:
    if name == "Results":
        from mslora_cr.analysis.tables import Results

        return Results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _config(run: Run, overrides: Sequence[str] = ()) -> StreamConfig:
    if isinstance(run, StreamConfig):
        if overrides:
            raise ConfigError("overrides apply to a configuration that is read here; pass them to load_config instead")
        return run
    return find_run(run, overrides)
