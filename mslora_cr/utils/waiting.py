"""Lets OpenMP threads sleep while they wait for each other, instead of spinning on cores that other programs need."""

from __future__ import annotations

import os

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables with which users set a policy themselves."""


def wait_passively() -> None:
    """Let the threads of this process and its children wait passively, unless the user set a policy.

    GNU's OpenMP (in PyTorch's wheels), LLVM's and Intel's read `OMP_WAIT_POLICY` when they are loaded, so call this
    before PyTorch is imported.
    """
    if not any(name in os.environ for name in POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
