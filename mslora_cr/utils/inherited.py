"""Variables that a process inherits from a shell or a launcher, and that must not decide what it computes."""

from __future__ import annotations

import os
from collections.abc import Sequence

ROUNDING = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
"""Variables that let libraries round products of float32 whatever the program asks for; read when they are loaded."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables with which launchers number the processes of a run."""
UNSET = ("", "0", "no", "none", "false", "strict")
"""Values that have no effect."""


def drop(prefixes: Sequence[str]) -> str:
    """Remove variables from the environment, and list those whose value has an effect.

    Args:
        prefixes: How the names of the variables begin.
    """
    dropped = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(tuple(prefixes))}
    return ", ".join(f"{name}={value}" for name, value in sorted(dropped.items()) if value.lower() not in UNSET)
