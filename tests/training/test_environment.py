"""What is trained never depends on variables of the environment unseen."""

import logging
import os
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers.integrations import WandbCallback

from mslora_cr.config.schema import ConfigError
from mslora_cr.distributed.comm import DistributedError, get_device, rank
from mslora_cr.distributed.launch import start_process_group
from mslora_cr.training import trackers
from mslora_cr.training.arguments import _say_ignored, ignore_launcher_settings
from mslora_cr.training.trackers import GuardedWandb, check_trackers


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


def test_what_launchers_leave_behind_starts_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    leftovers = {"RANK": "3", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "4", "WORLD_SIZE": ""}
    for name, value in leftovers.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert rank() == 0 and get_device("cpu").type == "cpu"
    ignore_launcher_settings()
    assert not {"LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & os.environ.keys()
    start_process_group(use_gpu=False)
    assert not torch.distributed.is_initialized()


def test_a_part_of_a_launchers_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedError, match="WORLD_SIZE=2, but not RANK, MASTER_ADDR, MASTER_PORT: unset"):
        start_process_group(use_gpu=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(DistributedError, match="WORLD_SIZE=two in the environment is no number"):
        start_process_group(use_gpu=False)


def test_a_tracker_that_is_lost_does_not_end_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def log_to_nobody(*_: object, **__: object) -> None:
        asked.append("log")
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(WandbCallback, "on_log", log_to_nobody)
    monkeypatch.setattr(WandbCallback, "on_train_end", log_to_nobody)
    callback = GuardedWandb.__new__(GuardedWandb)  # W&B's wants its package only to be made.
    with caplog.at_level(logging.WARNING, logger="mslora_cr"):
        for event in (callback.on_log, callback.on_log, callback.on_train_end):
            event(None, None, None)
    assert asked == ["log"]
    assert [record.getMessage() for record in caplog.records] == [
        "a tracker is lost (ConnectionResetError: 'Connection lost'); training goes on without it, and logs/ has the "
        "metrics"
    ]


def test_wandb_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"W&B has no key for api\.wandb\.ai; .* WANDB_MODE=offline"):
        check_trackers(["wandb"])
    check_trackers(["tensorboard"])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no key for 127\.0\.0\.1"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_a_tracker_whose_server_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_DISABLED", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password 0\n")
    monkeypatch.setenv("WANDB_MODE", "online")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # It answers "501, unsupported method".
        Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        check_trackers(["wandb"])
    assert os.environ["WANDB_MODE"] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, logger="mslora_cr"):
        check_trackers(["wandb"])
    assert os.environ["WANDB_MODE"] == "offline"
    assert "the server http://127.0.0.1:9 cannot be reached (ConnectError" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(trackers, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It accepts connections and never answers.
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        check_trackers(["wandb"])
    assert os.environ["WANDB_MODE"] == "offline" and "ReadTimeout" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"MLflow's server http://127\.0\.0\.1:9 cannot be reached .* sqlite"):
        check_trackers(["mlflow"])
