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
    """What constant answers give, as shares of questions whose answer says the true class.

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
        temperature: fitted on validation questions; None where there are none.
        scaled_error: the expected calibration error at this temperature.
    """

    expected_error: float
    brier: float | None
    reliability: float | None
    resolution: float | None
    uncertainty: float | None
    risk_coverage_area: float
    accuracy_at_80: float
    accuracy_at_90: float
    temperature: float | None = None
    scaled_error: float | None = None


class ChoicesMeasured(Part):
    """Answers to questions with options: those that choose one, none, and several. Only the first can be right."""

    parsed: int
    unparsed: int
    ambiguous: int


class ReliabilityPoint(Part):
    """A bin of a reliability diagram: mean confidence, share of right answers, number of questions."""

    confidence: float
    accuracy: float
    questions: int


class Curves(Part):
    """What a task's plots are drawn from, thinned to at most 101 points a curve; shares.

    Attributes:
        roc: by class against the rest, (false positive rate, true positive rate); of two classes the last one's alone,
            of more at most six, the commonest.
        reliability: bins of equal mass, in the order of confidence.
        risk_coverage: (share of questions answered, share of these that is wrong), surest first.
    """

    roc: dict[str, tuple[tuple[float, float], ...]]
    reliability: tuple[ReliabilityPoint, ...]
    risk_coverage: tuple[tuple[float, float], ...]


class ClosedMeasured(Part):
    """Closed questions together, of a task or of one text.

    Attributes:
        question: the text that all share; None of a task's together.
        questions: how many.
        groups: how many images or patients.
        classes: the true answers.
        confusion: true class × said class; the last column holds answers of no class, which never count as right.
        calibration: of the candidates' probabilities; None without them.
        choices: how answers to questions with options were read; None without such questions.
        curves: of a task's questions together; None without probabilities.
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
    choices: ChoicesMeasured | None = None
    curves: Curves | None = None


class CountsMeasured(Part):
    """Questions whose true answers are numbers.

    Attributes:
        unparsed: answers without a number.
        exact: the share that is right.
        near: the share that is off by one at most; None in files of earlier versions.
    """

    questions: int
    unparsed: int
    mean_absolute_error: Measured | None
    exact: Measured
    near: Measured | None = None


class LabelMeasured(Part):
    """A label of sets.

    Attributes:
        questions: whose true set has it.
        said: answers that name it.
        sensitivity: of the questions whose set has it, the share whose answer names it.
        specificity: of the others, the share whose answer does not.
    """

    name: str
    questions: int
    said: int
    sensitivity: Measured | None
    specificity: Measured | None


class LabelSetsMeasured(Part):
    """Questions whose answer is a set of labels, in any order.

    Attributes:
        f1: mean F1 of the sets.
        exact: the share of sets that are the same.
        by_label: the commonest labels, at most 50.
    """

    questions: int
    f1: Measured
    exact: Measured
    by_label: tuple[LabelMeasured, ...]


class GroupMeasured(Part):
    """Closed questions about one group of patients.

    Attributes:
        score: the share that is right; None of fewer than ten patients.
        p: that the group scores like all others, by permutation of patients' labels, adjusted by Holm's method; None
            where labels differ within a patient.
        guess: what the best constant answer within the group gives to each question; None in files of earlier versions.
    """

    questions: int
    patients: int
    score: Measured | None
    p: float | None
    guess: float | None = None


class AttributeMeasured(Part):
    """Closed questions by the values of an attribute.

    Attributes:
        groups: by value, or by band of a number.
        worst: the scored group with the lowest score; null where fewer than two are scored.
        gap: the largest score less the lowest, with an interval by resampling of patients.
        association: Cramér's V of attribute and true answer: near 1, the attribute alone predicts the answer.
        missing: questions whose records do not have the attribute.
        alone: the share that is right if nothing but question and attribute is seen: the best constant answer within
            each group. None in files of earlier versions.
        shortcut: whether that is above one constant for all groups, and the model's score is not above it.
    """

    groups: dict[str, GroupMeasured]
    worst: str | None
    gap: Measured | None
    association: Measured
    missing: int
    alone: float | None = None
    shortcut: bool = False

    def in_words(self) -> str:
        """A warning of a shortcut; empty where there is none."""
        if not self.shortcut or self.alone is None:
            return ""
        return f"Shortcut: this attribute alone gives {100 * self.alone:.1f} %, which the model is not above"


class Clinical(StateFile):
    """`clinical.json`: closed questions of a file together and by text, counts, and sets of labels; null where there
    are none.

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
    label_sets: LabelSetsMeasured | None = None
    subgroups: dict[str, AttributeMeasured] = Field(default_factory=dict)
