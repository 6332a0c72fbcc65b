"""The modules of 0.1.0, under their old names: scripts that import from them run, with a DeprecationWarning.

Until 0.3.0. What was renamed since, rather than moved, is in CHANGELOG.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "bank_stack": ("banks.stack", "banks.experts"),
    "banks": ("banks.io", "banks.bank", "banks.published", "utils.files"),
    "chains": ("stream.import_export", "banks.bank"),
    "config": ("config.schema", "utils.errors"),
    "config_file": ("config.load",),
    "data.annotations": ("data.sources.annotations",),
    "data.catalog": ("data.sources.catalog",),
    "data.check": ("data.sources.check", "data.sources.check_report", "data.lengths"),
    "data.download": ("data.sources.download",),
    "data.pcam": ("data.sources.pcam",),
    "data.prepare": ("data.sources.prepare",),
    "data.raw": ("data.sources.raw",),
    "data.synthetic": ("synthetic.stream",),
    "data.synthetic_images": ("synthetic.images",),
    "errors": ("utils.errors",),
    "evaluation.geometry": ("banks.similarity",),
    "evaluation.heatmaps": ("reporting.heatmaps",),
    "evaluation.plots": ("reporting.plots",),
    "evaluation.record": (
        "reporting.run_record",
        "evaluation.results",
        "evaluation.files",
        "evaluation.figures",
        "runs.entries",
        "banks.similarity",
    ),
    "evaluation.report": (
        "reporting.report",
        "reporting.style",
        "reporting.comparison",
        "reporting.sweep_page",
    ),
    "files": ("utils.files",),
    "inspection": ("models.inspect",),
    "llava_med": ("models.llava_med", "models.layout", "models.vision", "models.digest"),
    "losses": ("losses.contrastive",),
    "precision": ("utils.precision",),
    "router": ("routing.features", "routing.lda"),
    "runtime": ("runs.session",),
    "tiny_model": ("synthetic.model",),
    "tiny_pretraining": ("synthetic.pretraining",),
    "training.distributed": ("distributed.comm", "distributed.deepspeed"),
    "training.ledger": ("runs.ledger",),
    "training.penalties": ("losses.penalty", "losses.bank_penalties"),
    "training.processes": ("distributed.launch",),
    "training.stream": ("stream.train", "stream.plan", "stream.arguments", "stream.checks"),
    "workers": ("utils.workers",),
}
"""Where the names of each are now, in the order in which they are looked for."""


def moved(earlier: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: a name of the module `mslora_cr.{earlier}` of 0.1.0, from where it is now."""
    module = f"mslora_cr.{earlier}"

    def find(name: str) -> Any:
        if not name.startswith("_") and not _is_submodule(f"{module}.{name}"):
            for place in MOVED[earlier]:
                names = vars(import_module(f"mslora_cr.{place}"))
                if name in names:
                    message = f"{module} has moved: `from mslora_cr.{place} import {name}`"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    return names[name]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def _is_submodule(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # what stands before the dot is no package
        return False


def install() -> None:
    """Let the modules that are gone be imported. Nothing is loaded before a name of theirs is asked for."""
    for earlier in MOVED:
        if not _is_package(earlier):
            stand_in = ModuleType(f"mslora_cr.{earlier}", f"Moved to {', '.join(MOVED[earlier])}.")
            stand_in.__getattr__ = moved(earlier)  # type: ignore[method-assign]
            sys.modules.setdefault(stand_in.__name__, stand_in)
            package, _, name = stand_in.__name__.rpartition(".")
            setattr(import_module(package), name, stand_in)  # as an import of a file does


def _is_package(earlier: str) -> bool:
    """Whether a folder of that name has taken the module's place; its `__init__.py` calls `moved`."""
    return earlier in ("banks", "config", "losses")
