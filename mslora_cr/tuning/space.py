"""The search space of a tuning: which keys of a configuration are tried, and which values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mslora_cr.config.plain_yaml import read_plain_yaml
from mslora_cr.config.schema import ConfigError
from mslora_cr.utils.errors import first_problem, nearest

SPACES = Path(__file__).with_name("spaces")
"""A space for every shipped method, with the values that its source searches or publishes."""
PER_TASK = "tasks.*."
"""The prefix of keys that have a value for each task."""


class Range(BaseModel):
    """Numbers between two ends, both included.

    Attributes:
        low: The least.
        high: The greatest.
        log: Whether they are drawn evenly on a logarithmic scale.
        step: The distance of neighbours; with whole ends and steps the values are whole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        if self.log and self.step is not None:
            raise ValueError("a logarithmic range has no step")
        return self

    def distribution(self) -> BaseDistribution:
        numbers = (self.low, self.high, self.step)
        if self.step is not None and all(float(number).is_integer() for number in numbers if number is not None):
            return IntDistribution(int(self.low), int(self.high), step=int(self.step))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Space:
    """What a study draws from.

    Attributes:
        stream: Keys that have one value for the whole stream.
        task: Keys that have a value for each task, without `tasks.*.`.
    """

    stream: Mapping[str, BaseDistribution]
    task: Mapping[str, BaseDistribution]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """All distributions, by the key in the file."""
        return {**self.stream, **{PER_TASK + key: value for key, value in self.task.items()}}


def read_space(name: str | Path) -> Space:
    """Read a space from a YAML file, or take the shipped one of a method.

    Args:
        name: A file, or a method's name.

    Raises:
        ConfigError: There is no such space, or it is malformed.
    """
    path = Path(name)
    if not path.suffix and not path.is_file():
        path = SPACES / f"{name}.yaml"
        if not path.is_file():
            names = sorted(file.stem for file in SPACES.glob("*.yaml"))
            hint = nearest(str(name), names) or f"; shipped ones: {', '.join(names)}"
            raise ConfigError(f"--space {name}: no such file, and no space of that name{hint}")
    try:
        content = read_plain_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: expected keys with their values, as in `lora.rank: [4, 8]`")
    drawn = {str(key): _distribution(path, str(key), values) for key, values in content.items()}
    return Space(
        {key: values for key, values in drawn.items() if not key.startswith("tasks.")},
        {key.removeprefix(PER_TASK): values for key, values in drawn.items() if key.startswith(PER_TASK)},
    )


def _distribution(path: Path, key: str, values: Any) -> BaseDistribution:
    if key.startswith("tasks.") and not key.startswith(PER_TASK):
        raise ConfigError(f"{path}: {key}: a key of tasks begins with {PER_TASK}")
    if isinstance(values, list) and values and all(isinstance(value, str | int | float) for value in values):
        return CategoricalDistribution(values)
    try:
        return Range.model_validate(values).distribution()
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {key}: {first_problem(error)}; give a list of values, or {{low: …, high: …}}"
        ) from None
