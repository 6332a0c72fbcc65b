"""The configurations that the package ships. Their names are accepted wherever a file is expected."""

from __future__ import annotations

from pathlib import Path

from mslora_cr.config.schema import ConfigError
from mslora_cr.utils.errors import nearest

DEFAULTS = Path(__file__).with_name("defaults")


def configurations() -> dict[str, Path]:
    """Return the YAML files by name."""
    return {path.stem: path for path in sorted(DEFAULTS.glob("*.yaml"))}


def deepspeed_configurations() -> dict[str, Path]:
    """Return DeepSpeed's JSON files by name."""
    return {path.stem: path for path in sorted((DEFAULTS / "deepspeed").glob("*.json"))}


def find_config(given: str | Path, folder: Path = Path()) -> Path:
    """Return the file at that path, or the shipped configuration of that name. An existing file takes precedence.

    Args:
        folder: The folder that a relative path starts from.

    Raises:
        ConfigError: There is neither; the message names the nearest one.
    """
    path = folder / given
    shipped = configurations()
    if path.is_file() or str(given) not in shipped:
        return _existing(path, shipped, "configuration")
    return shipped[str(given)]


def find_deepspeed(given: str) -> Path:
    """Do what `find_config` does, for `training.deepspeed`."""
    shipped = deepspeed_configurations()
    if Path(given).is_file() or given not in shipped:
        return _existing(Path(given), shipped, "DeepSpeed configuration")
    return shipped[given]


def _existing(path: Path, shipped: dict[str, Path], kind: str) -> Path:
    if not path.exists():
        hint = f"the package's own are {', '.join(shipped)}"
        raise ConfigError(
            f"{path}: cannot be read (there is no such file, nor a {kind} of that name"
            f"{nearest(path.stem, shipped)}; {hint})"
        )
    return path
