"""`clinical.json`, typed: what a clinical reader asks of a file of answers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mslora_cr.statistics.interval import Interval
from mslora_cr.utils.state import Part, StateFile

CLINICAL = "clinical.json"


class Measured(Part):
    """A value, in [0, 1] (Matthews' correlation in [-1, 1], a count's error in its own unit), and the ends of its 95 %
    interval; null where too few questions carry one."""

    value: float
    interval: Interval | None


class ClassMeasured(Part):
    """A class against the rest.

    Attributes:
        name: of the class.
        questions: of how many it is the truth.
        said: how many were answered by it.
        recall: of those of which it is the truth, the share that says it.
        precision: of those that say it, the share of which it is the truth.
        auroc: area under the ROC curve; null without probabilities.
        average_precision: area under the precision–recall curve; likewise.
    """

    name: str
    questions: int
    said: int
    recall: Measured | None
    precision: Measured | None
    auroc: Measured | None = None
    average_precision: Measured | None = None


class Guessing(Part):
    """What constant answers give, as shares of questions that are right in whole words.

    Attributes:
        score: the model's.
        majority: that of the most frequent training answer to the same question; None without training records.
        hindsight: that of the best constant answer to each question.
        unseen: questions asked that training does not have.
        gain: the model's score less the majority's (the hindsight's, where there is none), in points, with its
            interval.
        above: whether the interval of the gain lies above 0.
        always: the one answer that the model gives to every question; None where it gives several.
    """

    score: float
    majority: float | None
    hindsight: float
    unseen: int | None
    gain: float
    interval: Interval
    above: bool
    always: str | None

    def in_words(self) -> str:
        """What a table says of a score that guessing reaches; empty where the score is above it."""
        if self.above:
            return ""
        reached = self.hindsight if self.majority is None else self.majority
        always = f"always says {self.always}: " if self.always else ""
        return f"{always}not above {100 * reached:.1f} % by guessing"


class Calibration(Part):
    """How far the probabilities of the given answers can be trusted; shares, none of them with an interval.

    Attributes:
        expected_error: expected calibration error of the likeliest candidate, over ten bins of equal mass.
        brier: the Brier score of the last of two classes; None where there are more than two.
        reliability: its part that calibration would remove.
        resolution: its part by which forecasts tell questions apart, which lowers the score.
        uncertainty: its part that the base rate alone causes.
        risk_coverage_area: the mean share of wrong answers among the surest, over all coverages.
        accuracy_at_80: the share of right answers among the surest 80 %.
        accuracy_at_90: the same among the surest 90 %.
    """

    expected_error: float
    brier: float | None
    reliability: float | None
    resolution: float | None
    uncertainty: float | None
    risk_coverage_area: float
    accuracy_at_80: float
    accuracy_at_90: float


class ClosedMeasured(Part):
    """Closed questions together, of a task or of one text.

    Attributes:
        question: the text that all share; None of a task's together.
        questions: how many.
        groups: how many images or patients.
        classes: the true answers.
        confusion: true class × said class; the last column holds answers of no class, which never count as right.
        calibration: of the candidates' probabilities; None without them.
        figures: by name, as `metrics.closed.confusion_figures` and `metrics.discrimination` give them.
    """

    question: str | None
    questions: int
    groups: int
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    figures: dict[str, Measured]
    by_class: tuple[ClassMeasured, ...]
    guessing: Guessing
    calibration: Calibration | None = None


class CountsMeasured(Part):
    """Questions whose true answers are whole numbers."""

    questions: int
    unparsed: int
    mean_absolute_error: Measured | None
    exact: Measured


class GroupMeasured(Part):
    """Closed questions about one group of patients; a score only from ten patients on. `p` is that of a permutation of
    patients' labels, adjusted by Holm's method; null where labels differ within a patient."""

    questions: int
    patients: int
    score: Measured | None
    p: float | None


class AttributeMeasured(Part):
    """Closed questions by the values of an attribute.

    Attributes:
        groups: by value, or by band of a number.
        worst: the scored group with the lowest score; null where fewer than two are scored.
        gap: the largest score less the lowest, with an interval by resampling of patients.
        association: Cramér's V of attribute and true answer: near 1, the attribute alone predicts the answer.
        missing: questions whose records do not have the attribute.
    """

    groups: dict[str, GroupMeasured]
    worst: str | None
    gap: Measured | None
    association: Measured
    missing: int


class Clinical(StateFile):
    """`clinical.json`: closed questions of a file together and by text, and counts; null where there are none.

    Attributes:
        subgroups: of the closed questions, by attribute.
        texts_left_out: how many question texts with fewer than ten questions have no entry of their own.
    """

    MEND: ClassVar[str] = "remove it; `mslora-cr score` or `mslora-cr evaluate` writes it again from the answers"

    confidence: float
    closed: ClosedMeasured | None
    by_question: tuple[ClosedMeasured, ...]
    texts_left_out: int
    counts: CountsMeasured | None
    subgroups: dict[str, AttributeMeasured] = Field(default_factory=dict)
