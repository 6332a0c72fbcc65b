"""Consent to methods outside the package: importing a module runs it, and a run folder may come from anybody.

A module is imported only if the user named it, on the command line or in a configuration of their own, or trusted it by
name before. A run folder gives no consent.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mslora_cr.config.run_files import CONFIG, EVALUATION, LEDGER
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.state import StateFile

FOREIGN_FOLDERS = ("checkpoints", "results", "data", "pretrained_models")
"""Folders of the working directory for what others made, whatever a configuration says."""
_named: set[str] = set()
"""Methods that the user has named to this process."""


class UntrustedMethodError(UserError):
    """A method outside the package would have to be imported, but the user has neither named nor trusted it."""


class TrustedMethods(StateFile):
    """The user's list of trusted methods: the digest of each module, by `module:Class`."""

    MEND: ClassVar[str] = "remove it, and trust methods again with --trust-method"

    methods: dict[str, str] = Field(default_factory=dict)


def trust_file() -> Path:
    """Return the path of the user's list: `mslora-cr/trusted-methods.json` in `XDG_CONFIG_HOME`, or in `~/.config`."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return Path(base or Path.home() / ".config") / "mslora-cr" / "trusted-methods.json"


def name_method(method: str) -> None:
    """Note that the user named a method; this process may now import it."""
    _named.add(method)


def named_methods() -> frozenset[str]:
    """Return the methods that the user has named so far, for worker processes."""
    return frozenset(_named)


def trust_method(method: str) -> Path:
    """Trust `module:Class` in this and all later commands, as long as its module does not change; import nothing.

    Returns:
        The file that was hashed.

    Raises:
        UserError: There is no such module, or it lies in a folder for files from elsewhere.
    """
    module, separator, name = method.partition(":")
    if not separator or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UserError(f"--trust-method {method!r}: expected module:Class")
    try:
        files = module_files(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--trust-method {method}: there is no module {error.name!r} in the working directory, {Path.cwd()}, or on "
            "PYTHONPATH"
        ) from None
    if not files:
        raise UserError(f"--trust-method {method}: {module} is no file, so it cannot be trusted by its digest")
    check_place(method, files, ())
    path = trust_file()
    trusted = TrustedMethods.read_if_there(path) or TrustedMethods()
    path.parent.mkdir(parents=True, exist_ok=True)
    TrustedMethods(methods={**trusted.methods, method: _digest(files)}).write(path)
    return files[-1]


def check_consent(method: str) -> None:
    """Refuse to import a method that the user has neither named nor trusted.

    Raises:
        UntrustedMethodError: The message says how to allow it.
    """
    module = method.partition(":")[0]
    if method in _named or module in sys.modules:  # An imported module runs nothing again.
        return
    trusted = TrustedMethods.read_if_there(trust_file())
    digest = trusted.methods.get(method) if trusted else None
    if digest is None:
        raise UntrustedMethodError(
            f"method {method} is outside the package, and its module is not imported: no configuration of yours "
            f"names it. If you trust that module, pass --trust-method {method} once, or method={method} each time"
        )
    try:
        files = module_files(module)
    except ModuleNotFoundError:
        return  # The import reports it.
    if _digest(files) != digest:
        raise UntrustedMethodError(
            f"method {method}: {files[-1] if files else module} has changed since it was trusted, so it is not "
            f"imported. If you trust the new version, pass --trust-method {method} again"
        )


def check_place(method: str, files: Sequence[Path], foreign: Iterable[Path]) -> None:
    """Refuse a module that lies in a folder for files from elsewhere, whoever named it.

    Args:
        files: The files that importing the module would run.
        foreign: Further folders beside `FOREIGN_FOLDERS`.

    Raises:
        UntrustedMethodError: The message names the file and the folder.
    """
    for file in files:
        if (folder := foreign_place(file, foreign)) is not None:
            raise UntrustedMethodError(
                f"method {method}: {file} lies in {folder}, a folder for runs, results, data or models, which may come "
                "from others. No code is imported from there; move the module to another folder"
            )


def foreign_place(file: Path, foreign: Iterable[Path] = ()) -> Path | None:
    """Return the folder of runs, results, data or models in which a file lies, by its path or through links; None if
    there is none.

    A folder that also contains the working directory does not count, unless it is a run folder.
    """
    here = Path.cwd().resolve()
    distrusted = [folder.resolve() for folder in (*map(here.joinpath, FOREIGN_FOLDERS), *foreign)]
    for parent in (*Path(os.path.normpath(Path.cwd() / file)).parents, *file.resolve().parents):
        if _is_run(parent):
            return parent
        if parent in distrusted and not here.is_relative_to(parent):
            return parent
    return None


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder or a results folder."""
    if (folder / LEDGER).exists() or (folder / EVALUATION).exists():
        return True
    return (folder / CONFIG).exists() and (folder / "banks").is_dir()


def module_files(name: str) -> list[Path]:
    """Return the files that importing a module would run, those of its packages first; nothing is imported.

    Raises:
        ModuleNotFoundError: There is no such module; the error names the missing part.
    """
    files: list[Path] = []
    search_path: list[str] | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        spec = _find(part, search_path)
        if spec is None or (depth < len(parts) and spec.submodule_search_locations is None):
            raise ModuleNotFoundError(f"No module named {part!r}", name=part)
        search_path = list(spec.submodule_search_locations or [])
        if spec.has_location and spec.origin:
            files.append(Path(spec.origin))
    return files


def _find(name: str, search_path: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    """Find a module as the import system does, but without importing its packages."""
    if search_path is None:
        if str(Path.cwd()) not in sys.path:  # Methods are imported from here last.
            search_path = [*sys.path, str(Path.cwd())]
        for finder in sys.meta_path:
            if (spec := finder.find_spec(name, search_path)) is not None:
                return spec
        return None
    portions: list[str] = []
    for folder in search_path:
        importer = pkgutil.get_importer(folder)
        spec = importer.find_spec(name) if importer is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        portions += (spec.submodule_search_locations or []) if spec is not None else []
    if not portions:
        return None
    namespace = importlib.machinery.ModuleSpec(name, None, is_package=True)
    namespace.submodule_search_locations = portions
    return namespace


def _digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of what importing a module runs; for a package, of all its Python files."""
    last = files[-1] if files else None
    whole = sorted(last.parent.rglob("*.py")) if last is not None and last.stem == "__init__" else []
    digest = hashlib.sha256()
    for file in dict.fromkeys([*files, *whole]):
        digest.update(hashlib.sha256(check_regular(file).read_bytes()).digest())
    return digest.hexdigest()
