"""A release plan: what an update must show before it may ship. It is written and registered before the update is
trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mslora_cr.config.plain_yaml import read_plain_yaml
from mslora_cr.config.schema import ConfigError
from mslora_cr.runs.ledger import Ledger
from mslora_cr.utils.errors import first_problem
from mslora_cr.utils.state import StateFile

PLANS = "releases/plans"
"""Registrations of plans go into this folder of a run folder."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskRule(_Section):
    """Settings that differ for one task.

    Attributes:
        margin: The tolerated loss, in points; None: the plan's.
        metric: The score that decides; None: the plan's.
        level: The level of its test, at most the plan's; None: the plan's.
    """

    margin: float | None = Field(default=None, gt=0, le=100)
    metric: str | None = None
    level: float | None = Field(default=None, gt=0, lt=0.5)


class SubgroupRule(_Section):
    """What every group of patients with the same value of an attribute must show, in every earlier task.

    Attributes:
        margin: The tolerated loss, in points.
        level: The level of its tests, at most the plan's; None: the plan's.
        least_patients: Groups of fewer independent patients (or images) are counted, but not judged.
    """

    margin: float = Field(gt=0, le=100)
    level: float | None = Field(default=None, gt=0, lt=0.5)
    least_patients: int = Field(default=10, ge=2)


class CalibrationRule(_Section):
    """How far the probabilities of answers may be off after the update.

    Attributes:
        greatest_error: The greatest expected calibration error of each task's closed questions, in percent.
    """

    greatest_error: float = Field(gt=0, le=100)


class ForeignRule(_Section):
    """How many questions of learned tasks the router may take for questions of none.

    Attributes:
        greatest_share: The greatest share of each task's questions, in percent.
    """

    greatest_share: float = Field(gt=0, le=100)


class NewTask(_Section):
    """Requirements for the task that the update adds.

    Attributes:
        least_score: The score, in percent, that its one-sided lower bound must reach.
        better_than_base: Whether it must be better than the base model without a bank (needs `evaluate --stages all`).
    """

    least_score: float | None = Field(default=None, ge=0, le=100)
    better_than_base: bool = False


class Plan(_Section):
    """The content of a plan's YAML file.

    Attributes:
        metric: The score that decides, by its name in `metrics.json`.
        level: The probability with which all releases of a stream together may pass wrongly.
        margin: The tolerated loss of an earlier task, in points.
        tasks: Exceptions, by task.
        least_patients: Of fewer independent patients (or images) no task is judged: the update is held.
        new_task: What the newest task must show.
        probes: By held-out data set, the tolerated loss against the base model, in points.
        subgroups: By attribute of the test records, what each group of patients must show.
        calibration: How far probabilities may be off.
        foreign: How many questions may be flagged as like none of the tasks (needs `evaluate --banks-by routed`).
        routed: Whether the answers of `evaluate --banks-by routed` decide, as where the product is not told the task.
        note: What the authors want the record to say.
    """

    metric: str = "exact match score"
    level: float = Field(default=0.05, gt=0, lt=0.5)
    margin: float = Field(gt=0, le=100)
    tasks: dict[str, TaskRule] = Field(default_factory=dict)
    least_patients: int = Field(default=30, ge=2)
    new_task: NewTask = NewTask()
    probes: dict[str, float] = Field(default_factory=dict)
    subgroups: dict[str, SubgroupRule] = Field(default_factory=dict)
    calibration: CalibrationRule | None = None
    foreign: ForeignRule | None = None
    routed: bool = False
    note: str = ""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        """Check that no test has a level above the plan's: together they would pass wrongly more often."""
        rules: list[tuple[str, TaskRule | SubgroupRule]] = [
            (f"tasks.{name}", rule) for name, rule in self.tasks.items()
        ]
        rules += [(f"subgroups.{name}", rule) for name, rule in self.subgroups.items()]
        for key, rule in rules:
            if rule.level is not None and rule.level > self.level:
                raise ValueError(f"{key}.level: {rule.level} is above the plan's level {self.level}")
        return self

    def margin_of(self, task: str) -> float:
        """Return the tolerated loss of a task, in points."""
        rule = self.tasks.get(task, TaskRule())
        return self.margin if rule.margin is None else rule.margin

    def metric_of(self, task: str) -> str:
        """Return the name of the score that decides about a task."""
        return self.tasks.get(task, TaskRule()).metric or self.metric

    def share_of_level(self, rule: TaskRule | SubgroupRule | None) -> float:
        """Return the level of a rule's tests, as a share of the plan's."""
        return 1.0 if rule is None or rule.level is None else rule.level / self.level


class Registration(StateFile):
    """A plan as it stood at a time, and which tasks were finished then.

    Attributes:
        digest: SHA-256 of the plan's file.
        when: UTC time, ISO 8601.
        finished: The tasks whose banks existed.
    """

    MEND: ClassVar[str] = "register the plan again before the next task is trained"

    digest: str
    text: str
    when: str
    finished: tuple[str, ...]


def read_plan(path: Path, tasks: Sequence[str]) -> Plan:
    """Read a plan's file.

    Args:
        tasks: The tasks of the run, to which its exceptions may refer.

    Raises:
        ConfigError: It cannot be read, or asks for something unknown.
    """
    try:
        plan = Plan.model_validate(read_plain_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if unknown := sorted(set(plan.tasks) - set(tasks)):
        raise ConfigError(f"{path}: tasks: the run has no {', '.join(unknown)}; it has {', '.join(tasks)}")
    return plan


def register(path: Path, ledger: Ledger, tasks: Sequence[str]) -> Registration:
    """Record that a plan stands now; a plan that is already registered keeps its first registration.

    Raises:
        ConfigError: As for `read_plan`.
    """
    read_plan(path, tasks)
    earlier = registration_of(path, ledger)
    if earlier is not None:
        return earlier
    data = path.read_bytes()
    registration = Registration(
        digest=hashlib.sha256(data).hexdigest(),
        text=data.decode("utf-8-sig"),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        finished=tuple(ledger.tasks),
    )
    target = _registration_path(ledger, registration.digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    registration.write(target)
    return registration


def registration_of(path: Path, ledger: Ledger) -> Registration | None:
    """Return the registration of a plan's file as it stands; None where it was not registered, or has changed since.

    Raises:
        StateError: The registration is damaged.
    """
    return Registration.read_if_there(_registration_path(ledger, hashlib.sha256(path.read_bytes()).hexdigest()))


def _registration_path(ledger: Ledger, digest: str) -> Path:
    return ledger.folder / PLANS / f"{digest[:16]}.json"
