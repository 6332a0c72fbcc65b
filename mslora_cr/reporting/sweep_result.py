"""`sweep.json`, typed: the figures of every run of a sweep, and each method's summary."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from mslora_cr.statistics.intervals import Interval
from mslora_cr.utils.state import Part, StateFile

RESULT = "sweep.json"


class Against(Part):
    """The paired difference to MSLoRA-CR at the same order and seed: mean, standard deviation, pairs, and the tests
    that `sweep_summary.summarize` explains. Version 0.1.0 wrote only the first three."""

    mean: float
    deviation: float | None
    pairs: int
    interval: Interval | None = None
    orders_interval: Interval | None = None
    p: float | None = None
    p_flips: float | None = None
    p_adjusted: float | None = None


class Spread(Part):
    """A figure of a method over its runs; `sweep_summary.summarize` explains the fields."""

    runs: int
    mean: float
    deviation: float | None
    by_order: dict[str, float]
    between_orders: float | None
    within_orders: float | None
    against: Against | None


class Outcome(Part):
    """The figures of a finished run, by metric and name; `final` has every task's score after the last stage.

    `frozen` says whether the same frozen banks answer a task at every stage from its own on. `rank` is
    `answering_rank`, `seconds` the training time; `device_hours` and `parameters` are those of `Cost`. Version 0.1.0
    noted neither the rank nor these two.
    """

    run: str
    method: str
    order: int
    seed: int
    banks_by: str
    frozen: bool = Field(alias="told")
    rank: int | None = None
    seconds: float
    device_hours: float | None = None
    parameters: int | None = None
    figures: dict[str, dict[str, float | dict[str, float | None] | None]]


class SweepResult(StateFile):
    """`sweep.json`: the task orders by number, the seeds, figures by metric and method, and the runs."""

    MEND: ClassVar[str] = "the same `mslora-cr sweep` writes it again from the finished runs"

    orders: dict[str, list[str]]
    seeds: list[int]
    metrics: dict[str, dict[str, dict[str, Spread]]]
    runs: list[Outcome]
    environment: dict[str, Any]
