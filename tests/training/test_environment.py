"""What is trained never depends on variables of the environment unseen."""

import logging
import os
from pathlib import Path

import pytest

from mslora_cr.config.schema import ConfigError
from mslora_cr.distributed.comm import rank
from mslora_cr.training.arguments import _say_ignored, ignore_launcher_settings
from mslora_cr.training.trackers import check_trackers


def test_settings_of_accelerate_are_dropped_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _say_ignored.cache_clear()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    with caplog.at_level(logging.WARNING, logger="mslora_cr"):
        ignore_launcher_settings()
    assert not [name for name in os.environ if name.startswith("ACCELERATE_")]
    assert [record.getMessage() for record in caplog.records] == [
        "the environment sets ACCELERATE_MIXED_PRECISION=bf16, which is ignored: the configuration's `training` decides"
    ]


def test_a_rank_without_other_processes_is_a_leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank() == 0


def test_wandb_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"W&B has no key for api\.wandb\.ai; .* WANDB_MODE=offline"):
        check_trackers(["wandb"])
    check_trackers(["tensorboard"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0\n")
    check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no key for 127\.0\.0\.1"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
