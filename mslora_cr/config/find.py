"""Finds the configuration of a run from its YAML file, its run folder, or its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mslora_cr.config.load import load_config
from mslora_cr.config.run_files import CONFIG
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.config.shipped import configurations
from mslora_cr.utils.errors import nearest

RUN_FOLDERS = Path("checkpoints")
"""The default of `output_dir`, where runs are looked for by name."""


def find_run(target: str | Path, overrides: Sequence[str] = ()) -> StreamConfig:
    """Find the configuration of a run.

    Args:
        target: A YAML file; a run folder, whose path may start below `checkpoints/`; the name of a run, looked for in
            `checkpoints/` and one folder below it; or the name of a shipped configuration.
        overrides: As for `load_config`.

    Raises:
        ConfigError: There is no such run, several runs have that name, or the folder's configuration describes another
            run folder, which would be read instead.
    """
    path = Path(target)
    from_run_folders = RUN_FOLDERS / path
    if len(path.parts) > 1 and not (path / CONFIG).is_file() and (from_run_folders / CONFIG).is_file():
        return _of_folder(from_run_folders, overrides)
    if path.is_dir():
        return _of_folder(path, overrides)
    if path.exists() or path.name != str(target) or path.suffix:
        return load_config(path, overrides)
    folders = _run_folders()
    named = [folder for folder in folders if folder.name == path.name]
    if len(named) > 1:
        raise ConfigError(f"several runs are called {path.name}: {', '.join(map(str, named))}; give the folder")
    if not named and path.name in configurations():
        return load_config(path, overrides)
    if not named:
        near = nearest(path.name, {folder.name for folder in folders} | configurations().keys())
        raise ConfigError(f"{target}: no such configuration, run folder or run in {RUN_FOLDERS}/{near}")
    return _of_folder(named[0], overrides)


def _run_folders() -> list[Path]:
    files = [*RUN_FOLDERS.glob(f"*/{CONFIG}"), *RUN_FOLDERS.glob(f"*/*/{CONFIG}")]
    return sorted(path.parent for path in files)


def _of_folder(folder: Path, overrides: Sequence[str]) -> StreamConfig:
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no {CONFIG} there; give a configuration or a run folder")
    config, run_dir = load_config(folder / CONFIG, overrides, of_run=True), folder.resolve()
    if config.run_dir.resolve() != run_dir:
        raise ConfigError(
            f"{folder}: its {CONFIG} describes the run folder {config.run_dir.resolve()}. Move it back there, run "
            f"this where the run was trained, or give a configuration with run: {run_dir.name} and output_dir: "
            f"{run_dir.parent}"
        )
    return config
