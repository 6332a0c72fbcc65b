"""Where buffers are once ZeRO-3 has partitioned a model; `look_and_fail` is called in every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mslora_cr.stream import train as stream


def look_and_fail(folder: Path) -> None:
    """Have the partitioned model computed on a device that it is not on, and write which buffers are elsewhere.

    The `meta` device stands for a GPU: it needs none, and nothing goes there by itself.
    """
    partition = stream.partition

    def partition_and_look(model: Any, config: Any, device: torch.device, *rest: Any) -> None:
        assert device == torch.device("cpu")
        partition(model, config, torch.device("meta"), *rest)
        buffers = {name: buffer.device.type for name, buffer in model.named_buffers()}
        (folder / "buffers.json").write_text(json.dumps(buffers))
        raise ZeroDivisionError("planted")

    stream.partition = partition_and_look
