"""W&B, TensorBoard and MLflow have one run per task, which every launch continues."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx
from pydantic import Field
from transformers import Trainer, TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback
from transformers.utils import ENV_VARS_TRUE_VALUES

from mslora_cr.config.schema import ConfigError
from mslora_cr.distributed.comm import rank
from mslora_cr.utils.errors import shorten
from mslora_cr.utils.proxies import proxy_advice
from mslora_cr.utils.state import StateFile

log = logging.getLogger(__name__)

TRACKERS = "trackers.json"
REACH_SECONDS = 10.0
"""The longest time that a tracker's server may take to answer."""
FINISH_SECONDS = 60
"""The longest time that W&B may take to upload at the end of a task, unless `WANDB_FINISH_TIMEOUT` is set."""


class TrackerRuns(StateFile):
    """`logs/trackers.json` of a run folder: the tracker's run of each task."""

    MEND: ClassVar[str] = "remove it; resumed tasks then get new runs in W&B and MLflow"

    wandb: dict[str, str] = Field(default_factory=dict)
    mlflow: dict[str, str] = Field(default_factory=dict)


_READS_IF: dict[type[TrainerCallback], tuple[str, set[str]]] = {
    WandbCallback: ("WANDB_LOG_MODEL", {"CHECKPOINT"}),
    MLflowCallback: ("HF_MLFLOW_LOG_ARTIFACTS", ENV_VARS_TRUE_VALUES),
}
"""Trackers that read checkpoints if an environment variable says so."""


class _Guarded(TrainerCallback):
    """Makes a tracker's callback that cannot end training: after its first error it logs nothing more."""

    lost = False

    def _call(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if not self.lost:
            with _training_goes_on() as failed:
                event(*args, **kwargs)
            self.lost = bool(failed)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._call(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._call(super().on_log, *args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._call(super().on_save, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._call(super().on_train_end, *args, **kwargs)


class GuardedWandb(_Guarded, WandbCallback):
    """Logs to W&B as long as it can."""


class GuardedMLflow(_Guarded, MLflowCallback):
    """Logs to MLflow as long as it can."""


@contextmanager
def _training_goes_on() -> Iterator[list[Exception]]:
    """Warn of an error in a tracker, whatever its library raises; yield a list that then holds the error."""
    failed: list[Exception] = []
    try:
        yield failed
    except Exception as error:
        failed.append(error)
        log.warning(
            "a tracker is lost (%s: %s); training goes on without it, and logs/ has the metrics",
            type(error).__name__,
            shorten(str(error)),
        )


def reads_checkpoints(callbacks: Iterable[TrainerCallback]) -> bool:
    """Return whether a tracker reads a checkpoint as soon as it is saved, to upload it."""
    for callback in callbacks:
        if type(callback).on_save is not TrainerCallback.on_save:
            conditions = [held for kind, held in _READS_IF.items() if isinstance(callback, kind)]
            name, values = conditions[0] if conditions else ("", set())
            if not name or os.environ.get(name, "").upper() in values:
                return True
    return False


def check_trackers(report_to: Iterable[str]) -> None:
    """Check that the trackers can be used, before anything is loaded. W&B goes offline if its server cannot be reached.

    Raises:
        ConfigError: W&B has no key, but is to be online; or MLflow's server cannot be reached.
    """
    if "wandb" in report_to:
        _check_wandb()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "mlflow" in report_to and rank() == 0 and uri.startswith("http") and (problem := _unreachable(uri)):
        raise ConfigError(
            f"training.report_to: MLflow's server {uri} cannot be reached ({problem}). Start it, or set "
            "MLFLOW_TRACKING_URI to a database on this machine, such as sqlite:///mlflow.db"
        )


def _check_wandb() -> None:
    mode = os.environ.get("WANDB_MODE", "online")
    disabled = os.environ.get("WANDB_DISABLED", "").upper() in ENV_VARS_TRUE_VALUES
    if disabled or mode in ("offline", "disabled", "dryrun"):
        return
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(url).hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        raise ConfigError(
            f"training.report_to: W&B has no key for {host}; log in with `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the metrics on this machine"
        )
    # Something that accepts connections, such as a proxy, may never answer what W&B asks.
    if rank() == 0 and (problem := _unreachable(f"{url.rstrip('/')}/graphql", {"query": "{ viewer { id } }"})):
        _go_offline(f"the server {url} cannot be reached ({problem})")


def _go_offline(why: str) -> None:
    """Make W&B write to this machine's disk from now on, in this process and its child processes."""
    log.warning("W&B works offline: %s. `wandb sync` uploads the metrics later", why)
    os.environ["WANDB_MODE"] = "offline"


def _unreachable(url: str, body: object = None) -> str:
    """Explain why a server cannot be reached; empty if it answers anything at all.

    Args:
        url: Its address.
        body: Sent as JSON; None asks for the headers of a page.
    """
    try:
        with httpx.stream("HEAD" if body is None else "POST", url, json=body, timeout=REACH_SECONDS):
            pass
    except (httpx.TransportError, httpx.InvalidURL, ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}{proxy_advice(urlsplit(url).hostname or '')}"
    return ""


def _in_netrc(host: str) -> bool:
    """Return whether `wandb login` has stored a key."""
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def tracked(trainer: Trainer, logs: Path, task: str, step: int) -> Iterator[None]:
    """Wrap the training of a task: the trackers that its arguments report to continue the task's run.

    W&B and MLflow cannot delete what a killed launch logged after its last checkpoint; those steps are logged again
    with the same numbers. TensorBoard drops them.

    Args:
        logs: The run folder's logs.
        step: The step of the checkpoint from which training starts, or 0.
    """
    used = set(trainer.args.report_to)
    if trainer.args.process_index != 0 or not used:
        yield
        return
    runs = TrackerRuns.read_if_whole(logs / TRACKERS) or TrackerRuns()
    wandb_runs, mlflow_runs = dict(runs.wandb), dict(runs.mlflow)
    if "tensorboard" in used:
        from torch.utils.tensorboard import SummaryWriter

        trainer.remove_callback(TensorBoardCallback)
        folder = str(logs / "tensorboard" / task)
        trainer.add_callback(TensorBoardCallback(SummaryWriter(folder, purge_step=step + 1 if step else None)))
    for name, kind, guarded in (("wandb", WandbCallback, GuardedWandb), ("mlflow", MLflowCallback, GuardedMLflow)):
        if name in used:
            trainer.remove_callback(kind)
            trainer.add_callback(guarded())
    if "wandb" in used:
        _start_wandb(wandb_runs.setdefault(task, secrets.token_hex(8)), trainer.args.run_name)
    if "mlflow" in used:
        mlflow_runs[task] = _start_mlflow(mlflow_runs.get(task), trainer.args.run_name)
    logs.mkdir(parents=True, exist_ok=True)
    TrackerRuns(wandb=wandb_runs, mlflow=mlflow_runs).write(logs / TRACKERS)
    try:
        yield
    finally:  # Otherwise the next task would be logged into this one's run.
        if "wandb" in used:
            _finish_wandb()
        if "mlflow" in used:
            import mlflow

            with _training_goes_on():
                mlflow.end_run()


def _start_wandb(run_id: str, name: str | None) -> None:
    """Start or continue a run of W&B; go offline if its server does not accept the run."""
    import wandb

    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))  # W&B by itself would wait without end.
    project = os.environ.get("WANDB_PROJECT", "huggingface")  # the Trainer's own default
    mode: Any = os.environ.get("WANDB_MODE") or None  # W&B reads it once, but it may have changed since.
    try:
        wandb.init(project=project, name=name, id=run_id, resume="allow", mode=mode)
    except wandb.Error as error:
        _go_offline(f"it starts no run ({shorten(str(error))})")
        wandb.teardown()  # Otherwise W&B takes the run's id for used, and keeps the settings with which it began.
        wandb.init(project=project, name=name, id=run_id, mode="offline")


def _finish_wandb() -> None:
    """End the task's run of W&B; go offline if W&B's own process is lost."""
    import wandb

    with _training_goes_on() as failed:
        wandb.finish()
    if failed:
        _go_offline("its process does not answer")
        with suppress(Exception):  # It would raise the same at exit.
            wandb.teardown()


def _start_mlflow(run_id: str | None, name: str | None) -> str:
    """Continue a run of MLflow, or start one if there is none or the server does not know it; return its id."""
    import mlflow

    try:
        if run_id is not None:
            with suppress(mlflow.MlflowException):
                return str(mlflow.start_run(run_id).info.run_id)
            log.warning(
                "MLflow does not know the run %s, in which this task was logged before; a new one starts", run_id
            )
        return str(mlflow.start_run(run_name=name).info.run_id)
    except mlflow.MlflowException as error:
        raise ConfigError(f"training.report_to: MLflow cannot start a run: {error}") from None
