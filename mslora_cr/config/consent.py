"""Decides whether a configuration may name a method outside the package: a user's may, a run folder's may not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mslora_cr.config.methods import OUTSIDE
from mslora_cr.config.trust import (
    UntrustedMethodError,
    check_consent,
    check_place,
    foreign_place,
    module_files,
    name_method,
)

log = logging.getLogger(__name__)


def note_consent(
    raw: Mapping[str, Any],
    files: Sequence[tuple[Path, Mapping[str, Any]]],
    overrides: Sequence[str],
    of_run: bool,
) -> None:
    """Note that the user named the method of a configuration, if one of their overrides or files names it.

    Args:
        raw: The content of all files and overrides together.
        files: The file and those that it extends, each with its content.
        overrides: `key.path=value`, from the user.
        of_run: The first file comes from a run folder, and so chose what it extends.

    Raises:
        UntrustedMethodError: The user named or trusts the method, but its module lies in a folder for files from
            elsewhere.
    """
    method = raw.get("method")
    if not isinstance(method, str) or not OUTSIDE.fullmatch(method):
        return
    foreign = _foreign_folders(raw)
    source = next((index for index, (_, content) in enumerate(files) if "method" in content), None)
    by_file = source is not None and not of_run and not foreign_place(files[source][0], foreign)
    if by_file or any(override.startswith("method=") for override in overrides):
        _check_module(method, foreign)
        name_method(method)
        return
    try:
        check_consent(method)
    except UntrustedMethodError as error:
        _warn(str(error))
    else:
        _check_module(method, foreign)


@cache
def _warn(refusal: str) -> None:
    """Warn once per process about a method that is not imported."""
    log.warning("%s. Commands that do not need its code still work", refusal)


def _check_module(method: str, foreign: Sequence[Path]) -> None:
    try:
        files = module_files(method.partition(":")[0])
    except ModuleNotFoundError:
        return  # The import reports it.
    check_place(method, files, foreign)


def _foreign_folders(raw: Mapping[str, Any]) -> list[Path]:
    """Return the folders of runs, results, data and models that a configuration names, as far as it is valid."""
    sections = {key: value for key, value in raw.items() if isinstance(value, Mapping)}
    named = [raw.get("output_dir"), raw.get("results_dir")]
    named += [sections.get(key, {}).get(inner) for key, inner in (("data", "root"), ("model", "path"))]
    return [Path(path).expanduser() for path in named if isinstance(path, str) and path]
