"""Chooses the library whose kernels training uses."""

from __future__ import annotations

import importlib.util
from typing import Literal


def chosen_kernels(setting: Literal["auto", "liger", "torch"], device: str) -> Literal["liger", "torch"]:
    """Resolve `model.kernels` on this machine: `auto` is Liger where there is a GPU to use, and the package.

    Args:
        device: `model.device`.
    """
    if setting != "auto":
        return setting
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        return "torch"
    import torch  # not for --help

    return "liger" if torch.cuda.is_available() else "torch"
