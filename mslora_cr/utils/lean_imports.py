"""Import libraries without the parts that a command never uses, where these take much of its start."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

COMPILER = "torch._dynamo"
BITSANDBYTES = "bitsandbytes"


def import_transformers() -> None:
    """Import transformers' models for a process that answers by itself, without what answering never uses: PyTorch's
    compiler, its sharded tensors, and detectors' losses.

    Do nothing if transformers' models are imported already, or if a launcher started several processes.
    """
    if "transformers.modeling_utils" in sys.modules or os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        return
    import torch
    from transformers.utils.import_utils import is_scipy_available, is_torch_distributed_available

    # Both remember what they return.
    is_scipy_available.cache_clear()
    with _hidden("scipy"):
        is_scipy_available()
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()
    finally:
        torch.distributed.is_available = available
    try:
        with without_compiler():
            import_module("transformers.modeling_utils")
            import_module("transformers.generation.utils")
    except (ImportError, AttributeError):  # Other versions may need more of the compiler; the next import takes it.
        log.debug("transformers' models need PyTorch's compiler", exc_info=True)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Do not import PyTorch's compiler where functions are only decorated for it; afterwards, whatever imports it gets
    it. Do nothing if it is imported already.

    transformers decorates functions as it is imported, and PyTorch those that give weights on the meta device values.
    """
    if COMPILER in sys.modules:
        yield
        return
    import torch

    stand_in: Any = ModuleType(COMPILER)
    stand_in.__path__ = [f"{torch.__path__[0]}/_dynamo"]  # transformers imports a submodule that needs no other
    for name in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(stand_in, name, _undecorated)
    sys.modules[COMPILER] = stand_in
    try:
        yield
    finally:
        del sys.modules[COMPILER]


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    return _undecorated if function is None else function


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let a package look as if it were not installed."""
    loaded = {name: module for name, module in sys.modules.items() if name == package}
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(loaded)


def import_peft() -> None:
    """Import PEFT without bitsandbytes, which PEFT imports wherever it is installed.

    Do nothing if either is imported already. A base that is to be quantised calls `import_bitsandbytes`.
    """
    if {"peft", BITSANDBYTES} & sys.modules.keys():
        return
    from transformers.utils.import_utils import is_bitsandbytes_available

    with _hidden(BITSANDBYTES):
        from peft.import_utils import is_bnb_4bit_available

        is_bnb_4bit_available()  # remembers what it returns, and what `is_bnb_available` does
    is_bitsandbytes_available.cache_clear()  # an optimizer may come from the package


def import_bitsandbytes() -> None:
    """Import bitsandbytes, and let PEFT look for it again.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    import_module(BITSANDBYTES)  # transformers would only say that it is missing after reading every header
    if "peft" in sys.modules:
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        is_bnb_available.cache_clear()
        is_bnb_4bit_available.cache_clear()
