"""How checkpoints get their names, and older ones go."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from mslora_cr.training.checkpoints import Publisher, SaveError, checkpoints
from mslora_cr.training.trackers import reads_checkpoints


def written(folder: Path, step: int) -> Path:
    """A checkpoint that waits for its name."""
    place = folder / ".staging" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "state").write_text(str(step))
    return place


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept_in_the_order_of_their_steps(keep: int, tmp_path: Path) -> None:
    with Publisher(tmp_path, keep) as publisher:
        for step in (2, 10, 9, 100):
            publisher.publish(written(tmp_path, step), at_once=False)
    assert steps(tmp_path) == ["checkpoint-10", "checkpoint-100"][-keep:]


def test_a_checkpoint_that_cannot_be_published_is_told_and_the_one_before_stays(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="checkpoint-4 cannot be written"), Publisher(tmp_path, 1) as publisher:
        publisher.publish(written(tmp_path, 2), at_once=False)
        publisher.wait()
        publisher.publish(tmp_path / ".staging" / "checkpoint-4", at_once=False)  # nothing was written there
    assert steps(tmp_path) == ["checkpoint-2"]


def test_an_old_one_that_cannot_be_removed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    with Publisher(tmp_path, 1) as publisher, caplog.at_level(logging.WARNING, "mslora_cr"):
        publisher.publish(written(tmp_path, 2), at_once=True)
        assert steps(tmp_path) == ["checkpoint-2"]
        monkeypatch.setattr(shutil, "rmtree", busy)
        publisher.publish(written(tmp_path, 4), at_once=False)
        publisher.wait()
        assert steps(tmp_path) == ["checkpoint-2", "checkpoint-4"]
        assert "checkpoint-2 is no longer needed, but cannot be removed yet" in caplog.text
        monkeypatch.setattr(shutil, "rmtree", real)
        publisher.publish(written(tmp_path, 6), at_once=False)
    assert steps(tmp_path) == ["checkpoint-6"]


class Uploads(TrainerCallback):
    """A tracker that hands checkpoints on."""

    def on_save(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("callback", "variable", "value", "reads"),
    [
        (PrinterCallback, "WANDB_LOG_MODEL", "checkpoint", False),
        (WandbCallback, "WANDB_LOG_MODEL", "end", False),
        (WandbCallback, "WANDB_LOG_MODEL", "checkpoint", True),
        (MLflowCallback, "HF_MLFLOW_LOG_ARTIFACTS", "1", True),
        (Uploads, "WANDB_LOG_MODEL", "end", True),
    ],
)
def test_a_tracker_that_reads_checkpoints_finds_them(
    callback: type[TrainerCallback], variable: str, value: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    instance = callback.__new__(callback)  # W&B's and MLflow's want their packages only to be made
    vars(instance)["_auto_end_run"] = False  # MLflow's ends runs when it is thrown away
    assert reads_checkpoints([PrinterCallback(), instance]) == reads
