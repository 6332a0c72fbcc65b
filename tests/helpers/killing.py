"""Runs a command in a process of its own that kills itself with SIGKILL at a chosen call of a chosen function.

The processes are forked from a server that has imported everything and run nothing, so each starts in no time. Where
there is a GPU each is started anew: a fork cannot use CUDA.
"""

import gc
import multiprocessing
import os
import pkgutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mslora_cr.evaluation.evaluate
import mslora_cr.stream.train  # noqa: F401  (imported once, by the server)
from mslora_cr.cli.main import main

_CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if not torch.cuda.is_available():
    _CONTEXT.set_forkserver_preload([__name__])
    gc.freeze()  # in the server: collections then pass over what was imported


class KillPoint(NamedTuple):
    """The n-th call of a function, `module:name` or `module:Class.name`, before it starts or after it returns."""

    function: str
    call: int = 1
    after: bool = False


def run_until_killed(arguments: Sequence[str], point: KillPoint, output: Path) -> None:
    """Run `mslora-cr ARGUMENTS` until the point; what it prints goes to a file. Fails if it was never reached."""
    process = _CONTEXT.Process(target=_run, args=(list(arguments), point, output))
    process.start()
    process.join(timeout=120)
    if process.exitcode != -signal.SIGKILL:
        process.kill()
        raise AssertionError(f"{point} was not reached (exit code {process.exitcode}):\n{output.read_text()}")


def _run(arguments: list[str], point: KillPoint, output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    module, _, path = point.function.partition(":")
    *owners, name = path.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
    setattr(owner, name, _deadly(getattr(owner, name), point))
    raise SystemExit(main(arguments))


def _deadly(function: Callable[..., Any], point: KillPoint) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == point.call and not point.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == point.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped
