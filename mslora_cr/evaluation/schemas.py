"""The smaller files of a results folder, typed: `metrics.json`, `answers.json`, `routing.json`, `analysis.json`, and a
comparison's file.

`evaluation.json` is in `results`, with the figures computed from it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mslora_cr.statistics.interval import Interval, PairedChange, counted
from mslora_cr.utils.state import Part, StateFile

ROUTED, ROUTING = "routed", "routing.json"
"""The folder for task-agnostic answers in a results folder, and the file of the router's decisions."""
ANALYSIS = "analysis.json"
METRICS_FILE = "metrics.json"
ANSWERS = "answer-file.jsonl"
STAMP = "answers.json"
"""The origin of the answers in its folder."""

Matrix = list[list[float]]


class Metrics(StateFile):
    """`metrics.json`: the metrics of a file of answers, in percent, with the ends of each one's interval.

    Attributes:
        confidence: The confidence level of the intervals.
        empty_truths: The number of truths that normalising leaves empty, such as the choice `A`: the published closed
            accuracy finds them in every answer.
        groups: The number of clusters of answers that are not independent.
        freedom: The degrees of freedom of each interval.
        largest_cluster: The largest cluster's share of a metric's answers. Version 0.1.0 noted none of these five.
    """

    MEND: ClassVar[str] = "remove it; `mslora-cr score` or `mslora-cr evaluate` writes it again from the answers"

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    confidence: float | None = None
    empty_truths: int | None = None
    rows: int
    groups: int | None = None
    freedom: dict[str, float] = Field(default_factory=dict)
    largest_cluster: dict[str, float] = Field(default_factory=dict)
    open: int
    closed: int


class HeldOutTask(Part):
    """What is flagged as like none of the tasks where one learned task is held out, in percent.

    Attributes:
        false_alarms: The share of the other tasks' questions.
        detected: The share of the held-out task's questions.
        auroc: How well p-values tell the two apart: the area under the ROC curve.
    """

    false_alarms: float
    detected: float
    auroc: float


class StageRouting(Part):
    """The router's decisions after a stage.

    Attributes:
        learned: The tasks among which it chooses.
        confusion: By a question's task, how many questions were assigned to each of `learned`.
        questions: The number of questions of learned tasks.
        accuracy: The share of those that it assigned correctly, in percent.
        foreign: By a question's task, how many questions are like none of the learned tasks (`routing.foreign`): false
            alarms of a learned task, detections of another. None if the statistics are of an earlier version.
        foreign_by_part: The same by picture alone and by text alone; empty where that is not known.
        held_out: By learned task, and by the features that count, what is flagged where this task is held out.
    """

    stage: int
    learned: tuple[str, ...]
    confusion: dict[str, tuple[int, ...]]
    questions: int
    accuracy: float | None
    interval: Interval | None
    foreign: dict[str, int] | None = None
    foreign_by_part: dict[str, dict[str, int]] = Field(default_factory=dict)
    held_out: dict[str, dict[str, HeldOutTask]] = Field(default_factory=dict)

    def foreign_in_words(self) -> str:
        """Return how many questions of learned tasks, and of others, are like none of the learned; empty where not
        known.
        """
        if self.foreign is None:
            return ""
        parts = []
        for what, learned in (("of learned tasks", True), ("of tasks not learned yet", False)):
            tasks = [task for task in self.foreign if (task in self.learned) is learned]
            asked = sum(sum(self.confusion[task]) for task in tasks)
            if asked:
                share, *alone = (
                    100 * sum(flagged[task] for task in tasks) / asked
                    for flagged in (self.foreign, *self.foreign_by_part.values())
                )
                by_part = [f"{part} {of:.1f} %" for part, of in zip(self.foreign_by_part, alone, strict=True)]
                listed = f" (by the {', by the '.join(by_part)})" if by_part else ""
                parts.append(f"{share:.1f} % of {asked} questions {what}{listed}")
        return f"like none of the learned tasks: {', '.join(parts)}" if parts else ""

    @model_validator(mode="after")
    def _check_confusion(self) -> Self:
        if any(len(row) != len(self.learned) for row in self.confusion.values()):
            raise ValueError(f"confusion: each row has a number for each of the {len(self.learned)} learned tasks")
        return self


class Routing(StateFile):
    """`routing.json`: the router's decisions at every evaluated stage."""

    MEND: ClassVar[str] = "remove it; `mslora-cr evaluate CONFIG --banks-by routed` writes it again"

    stages: tuple[StageRouting, ...] = Field(min_length=1)


class Stamp(StateFile):
    """`answers.json`: the origin of the answers in its folder, and their digests.

    Attributes:
        fingerprint: The digest of everything that decides the answers.
        seconds: How long the last launch took to answer.
        padding: The share of padding in the prompts' batches.
        padding_unsorted: The share of padding in batches in the questions' own order.
        routing: In `routed/stage-K`, the router's decisions.
        sha256: The digest of the answer file; None in files of version 0.1.0.
        rows: The number of answers; None in files of version 0.1.0.
        images: The digest of the shown images; None in files of earlier versions.
        greedy: Whether a server accepted temperature 0; None if no server was asked.
    """

    MEND: ClassVar[str] = "remove it; the same command answers these questions again"

    fingerprint: str
    seconds: float | None = None
    padding: float | None = None
    padding_unsorted: float | None = None
    routing: StageRouting | None = None
    sha256: str | None = None
    rows: int | None = None
    images: str | None = None
    greedy: bool | None = None


class PairedNote(Part):
    """Remarks shown beside the interval of a paired difference.

    Attributes:
        gained: The number of questions whose score rose.
        lost: The number of questions whose score fell.
        most_lost: A one-sided 95 % upper bound of the share of questions whose score falls, in percent.
        mcnemar_p: The p-value of the exact test.
        freedom: The degrees of freedom; None if the difference is zero by construction.
        largest_cluster: The largest cluster's share; None likewise.
    """

    gained: int
    lost: int
    most_lost: float
    mcnemar_p: float
    freedom: float | None
    largest_cluster: float | None
    text: str

    @classmethod
    def of(cls, change: PairedChange, verb: str = "changed") -> PairedNote:
        notes = [note for note in (change.counted(verb), change.precision()) if note]
        return cls(
            gained=change.gained,
            lost=change.lost,
            most_lost=change.most_lost,
            mcnemar_p=change.p,
            freedom=change.freedom,
            largest_cluster=change.largest,
            text="; ".join(notes),
        )


class UpdateCosines(Part):
    """Cosines of the banks' updates, by decoder layer and by module; matrices in the order of `banks`."""

    banks: list[str]
    by_layer: dict[str, Matrix]
    by_module: dict[str, Matrix]

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        count = len(self.banks)
        for matrix in (*self.by_layer.values(), *self.by_module.values()):
            if [len(row) for row in matrix] != [count] * count:
                raise ValueError(f"similarity: each matrix has a row and a column for each of the {count} banks")
        return self


class EffectiveRank(Part):
    """A bank's rank, its mean effective rank, and that by decoder layer and by module."""

    rank: int
    mean: float
    by_layer: dict[str, float]
    by_module: dict[str, float]


class Dropped(Part):
    """A task's score with all its banks and without one, in percent, and the interval of the difference.

    `changed` questions have another score without the bank, and `change` says what that is worth. Version 0.1.0 noted
    neither, and no interval where fewer than five had changed.
    """

    task: str
    dropped: str
    questions: int
    with_all: float
    without: float
    contribution: float
    interval: Interval | None
    changed: int | None = None
    change: PairedNote | None = None

    @property
    def note(self) -> str:
        """Remarks shown beside the interval."""
        return self.change.text if self.change else counted(self.changed, self.questions)


class Contribution(Part):
    """The contribution of each bank to each task. `score` names the averaged metric."""

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
    similarity: UpdateCosines
    effective_rank: dict[str, dict[str, EffectiveRank]]
    contribution: Contribution | None
    changed: list[Change]


class ComparedRun(Part):
    """A run's method and how its banks are chosen; neither is known of answer files alone."""

    method: str | None
    banks_by: str | None


class BetweenTasks(Part):
    """The tasks as a sample of tasks like them: Student's t of their differences in points, and the sign test of how
    many were won and lost. `interval` and `p` are None of one task alone, the interval also of differences all
    equal."""

    tasks: int
    interval: Interval | None
    p: float | None
    wins: int
    losses: int
    sign_p: float
    p_adjusted: float | None = None


class PairedTest(Part):
    """A run against the baseline, on one task or in the mean over tasks: scores in percent, differences in points.

    Attributes:
        groups: The number of independent clusters of questions.
        baseline_interval: None, like the other intervals, for a figure whose interval would not cover often enough.
        changed: The number of questions whose scores differ between the runs.
        change: The tests of that difference.
        banks: The banks that answered, by run; None over all tasks.
        p_adjusted: Holm's.
        between_tasks: Given over all tasks only. Version 0.1.0 noted neither groups, changed, change nor this.
    """

    run: str
    task: str
    questions: int
    groups: int | None = None
    baseline_score: float
    baseline_interval: Interval | None
    score: float
    score_interval: Interval | None
    difference: float
    interval: Interval | None
    changed: int | None = None
    change: PairedNote | None = None
    p: float
    banks: dict[str, str | None] | None
    between_tasks: BetweenTasks | None = None
    p_adjusted: float | None = None

    @property
    def note(self) -> str:
        """Remarks shown beside the interval of the difference."""
        return self.change.text if self.change else counted(self.changed, self.questions, "differ")


class Comparison(StateFile):
    """The file of `mslora-cr compare --output`: how it was computed, the runs, and the tests by metric."""

    MEND: ClassVar[str] = "`mslora-cr compare` writes it again"

    baseline: str
    at: Literal["final", "own"]
    runs: dict[str, ComparedRun]
    test: str
    correction: str
    flips: int
    seed: int
    confidence: float
    metrics: dict[str, list[PairedTest]]
