"""Splits a base model over the GPUs of a host, to answer with one that is too large for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from mslora_cr.models.layout import ModelError

Device = int | str


def split_over_gpus(model: Any, memory: Mapping[Device, int] | None = None) -> None:
    """Place whole decoder layers on the GPUs in turn. Inputs and the first layers are on the first one.

    Args:
        memory: Bytes to fill on each device; by default balanced over the free memory of all GPUs.

    Raises:
        ModelError: The GPUs together cannot hold the model; no part of it is kept on the host or on a disk, where
            every token would wait for it.
    """
    devices = device_map(model, memory)
    dispatch_model(model, devices, skip_keys=model._skip_keys_device_placement, force_hooks=True)


def device_map(model: Any, memory: Mapping[Device, int] | None = None) -> dict[str, Device]:
    """Return the device of each part of a model; as `split_over_gpus`."""
    whole = list(model._no_split_modules or [])
    if memory is None:
        memory = get_balanced_memory(model, dtype=model.dtype, no_split_module_classes=whole)
        memory = {device: size for device, size in memory.items() if device != "cpu"}
    devices: dict[str, Device] = infer_auto_device_map(model, dict(memory), whole, dtype=model.dtype)
    if left := {str(device) for device in devices.values()} - {str(device) for device in memory}:
        held, free = (sum(sizes) / 1e9 for sizes in ((p.nbytes for p in model.parameters()), memory.values()))
        raise ModelError(
            f"model.device_map: the base model takes {held:.1f} GB, and {len(memory)} GPUs can take {free:.1f} GB, so "
            f"{', '.join(sorted(left))} would hold the rest; use more GPUs, or model.quantization=4bit on one"
        )
    return devices


def is_split(model: Any) -> bool:
    """Whether a model is on several devices, so that only transformers' own `generate` follows it."""
    return hasattr(model, "hf_device_map")
