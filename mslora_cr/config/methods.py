"""Resolves `method:` to a class. This is the only module of its room that imports from a higher one.

A name is that of a file in `mslora_cr/methods`, which is imported on demand: there is no registry, and `--help` imports
no method. `module:Class` names a class outside the package; its module is imported, and so run, only with the user's
consent (`trust`).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from pydantic import BaseModel

from mslora_cr.config.trust import UntrustedMethodError, check_consent
from mslora_cr.utils.errors import nearest

PACKAGE = "mslora_cr.methods"
BASE = "base"
"""The module of `Method` itself, which holds no method."""
OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`module:Class`, for a method outside the package."""


class MethodSettings(Protocol):
    """The part of a method that the configuration uses; `mslora_cr.methods.base.Method` documents it."""

    name: str
    section: type[BaseModel] | None
    former_defaults: Mapping[str, Any]
    banks_by: str
    all_at_once: bool
    keeps_frozen_adapters: bool
    mixes_banks: bool

    def check(self, config: Any) -> None: ...

    def bank_rank(self, rank: int, number: int) -> int: ...


def method_names() -> tuple[str, ...]:
    """Return the package's methods in alphabetical order, from the names of its files; nothing is imported."""
    folder = Path(__file__).parents[1] / "methods"
    return tuple(sorted(path.stem for path in folder.glob("[!_]*.py") if path.stem != BASE))


@cache
def load_method(name: str) -> MethodSettings:
    """Return the method of that name, a `mslora_cr.methods.base.Method`.

    Args:
        name: One of `method_names`, or `module:Class`, importable from the working directory or `sys.path`.

    Raises:
        UntrustedMethodError: The method is outside the package, and the user has neither named nor trusted it.
        ValueError: There is no such method; the message says what was looked for, and where.
    """
    base = importlib.import_module(f"{PACKAGE}.{BASE}").Method
    if name in method_names():
        return _method_class(importlib.import_module(f"{PACKAGE}.{name}"), base)()
    if not OUTSIDE.fullmatch(name):
        valid = method_names()
        raise ValueError(
            f"unknown method {name!r}{nearest(name, valid)}; there are {', '.join(valid)}, and module:Class for a "
            "class outside the package"
        )
    check_consent(name)
    module_name, _, class_name = name.partition(":")
    module = _import_outside(name, module_name)
    if not hasattr(module, class_name):
        raise ValueError(f"{name}: {module.__file__} has no {class_name}{nearest(class_name, vars(module))}")
    method = getattr(module, class_name)
    if not (isinstance(method, type) and issubclass(method, base)):
        raise ValueError(f"{name}: {class_name} is no subclass of {base.__module__}.{base.__name__}")
    if not re.fullmatch(r"[a-z]\w*", getattr(method, "name", "")):
        raise ValueError(f"{name}: {class_name} needs a `name` of lower-case letters, digits and _")
    return method()


def check_method(name: str) -> str:
    """Return the name if it is that of a method, or of one that may not be imported; otherwise ValueError as
    `load_method`."""
    if_trusted(name)
    return name


def if_trusted(name: str) -> MethodSettings | None:
    """Do what `load_method` does, but return None for a method outside the package that the user has neither named nor
    trusted."""
    try:
        return load_method(name)
    except UntrustedMethodError:
        return None


def _method_class(module: ModuleType, base: type) -> type:
    """Return the one method that a file of the package defines."""
    classes = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{module.__file__} should define one method, not {len(classes)}"
    return classes[0]


def _import_outside(name: str, module_name: str) -> ModuleType:
    """Import a module. The working directory comes last in the search, so that no file there can shadow a library."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name != error.name and not module_name.startswith(f"{error.name}."):
            raise ValueError(f"{name}: importing {module_name} failed: {error}") from None
        raise ValueError(
            f"{name}: there is no module {error.name!r} in the working directory, {here}, or on PYTHONPATH"
        ) from None
    except Exception as error:
        raise ValueError(f"{name}: importing {module_name} failed: {error!r}") from error
