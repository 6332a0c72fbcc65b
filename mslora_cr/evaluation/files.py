"""The smaller files of a results folder, typed: `answers.json`, `routing.json`, `analysis.json`.

`evaluation.json` is in `results`, with what is read off it.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mslora_cr.utils.state import Part, StateFile

ROUTED, ROUTING = "routed", "routing.json"
"""Where answers without the task being told go in a results folder, and what the router did there."""
ANALYSIS = "analysis.json"
ANSWERS = "answer-file.jsonl"
STAMP = "answers.json"
"""What the answers beside it were made from."""

Interval = tuple[float, float]
Matrix = list[list[float]]


class StageRouting(Part):
    """What the router took the questions for after a stage.

    Attributes:
        learned: the tasks it knows. confusion: by a question's task, how many were taken for each of `learned`.
        questions: how many are of learned tasks. accuracy: how many of those it knew, in percent.
    """

    stage: int
    learned: tuple[str, ...]
    confusion: dict[str, tuple[int, ...]]
    questions: int
    accuracy: float | None
    interval: Interval | None


class Routing(StateFile):
    """`routing.json`: what the router did at every evaluated stage."""

    MEND: ClassVar[str] = "remove it; `mslora-cr evaluate CONFIG --banks-by routed` writes it again"

    stages: tuple[StageRouting, ...] = Field(min_length=1)


class Stamp(StateFile):
    """`answers.json`: what the answers beside it were made from, and what they are.

    Attributes:
        fingerprint: of all that decides the answers. seconds: how long the last launch answered.
        padding: the share of padding in the prompts' batches, `padding_unsorted` in the questions' own order.
        routing: in `routed/stage-K`, what the router did. sha256, rows: digest and number of the answers; version 0.1.0
            noted neither.
    """

    MEND: ClassVar[str] = "remove it; the same command answers these questions again"

    fingerprint: str
    seconds: float | None = None
    padding: float | None = None
    padding_unsorted: float | None = None
    routing: StageRouting | None = None
    sha256: str | None = None
    rows: int | None = None


class Similarity(Part):
    """Cosines of the banks' updates, by decoder layer and by module; matrices in the order of `banks`."""

    banks: list[str]
    by_layer: dict[str, Matrix]
    by_module: dict[str, Matrix]


class EffectiveRank(Part):
    """A bank's rank, its mean effective rank, and that by decoder layer and by module."""

    rank: int
    mean: float
    by_layer: dict[str, float]
    by_module: dict[str, float]


class Dropped(Part):
    """A task's score with all its banks and without one, in percent, and the interval of the difference."""

    task: str
    dropped: str
    questions: int
    with_all: float
    without: float
    contribution: float
    interval: Interval


class Contribution(Part):
    """What each bank adds to each task. `score` says in words what is averaged."""

    banks_by: str
    score: str
    rows: list[Dropped]


class ChangedAnswer(Part):
    """An answer before and after; `kind` is `lost`, `gained` or `changed`."""

    kind: str
    question: str
    before: str
    after: str
    truth: str


class Change(Part):
    """How many answers to a task changed between two sides, how many hits were lost and gained, and examples."""

    task: str
    before: str = Field(alias="from")
    after: str = Field(alias="to")
    questions: int
    same_banks: bool
    changed: int
    lost: int
    gained: int
    examples: list[ChangedAnswer]


class Analysis(StateFile):
    """`analysis.json`: what explains a run's result."""

    MEND: ClassVar[str] = "`mslora-cr analyze CONFIG` writes it again"

    run: str
    similarity: Similarity
    effective_rank: dict[str, dict[str, EffectiveRank]]
    contribution: Contribution | None
    changed: list[Change]
