"""Chooses the library whose kernels training uses."""

from __future__ import annotations

import importlib.util
from typing import Literal


def chosen_kernels(setting: Literal["auto", "liger", "torch"], device: str) -> Literal["liger", "torch"]:
    """Resolve `model.kernels` on this machine: `auto` means Liger if there is a GPU and the package is installed."""
    if setting != "auto":
        return setting
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        return "torch"
    import torch  # torch is too slow to import for --help.

    return "liger" if torch.cuda.is_available() else "torch"
