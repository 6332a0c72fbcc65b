"""`clinical.json`, typed: what a clinical reader asks of a file of answers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mslora_cr.metrics.measured import CountsMeasured, LabelMeasured, Measured, ReliabilityPoint
from mslora_cr.statistics.interval import Interval
from mslora_cr.utils.state import Part, StateFile

CLINICAL = "clinical.json"


class ClassMeasured(Part):
    """A class against the rest.

    Attributes:
        name: Name of the class.
        questions: Number of questions whose truth is this class.
        said: Number of answers that say this class.
        recall: Share of the questions with this truth whose answer says it.
        precision: Share of the answers that say this class for which it is the truth.
        auroc: Area under the ROC curve; null without probabilities.
        average_precision: Area under the precision–recall curve; null without probabilities.
    """

    name: str
    questions: int
    said: int
    recall: Measured | None
    precision: Measured | None
    auroc: Measured | None = None
    average_precision: Measured | None = None


class Guessing(Part):
    """What constant answers score, as shares of questions whose answer says the true class.

    Attributes:
        score: The model's score.
        majority: The score of the most frequent training answer to the same question; None without training records.
        hindsight: The score of the best constant answer to each question.
        unseen: Number of questions that training does not have.
        gain: The model's score minus the majority's (or the hindsight's where there is no majority), in points, with
            its interval.
        above: Whether the interval of the gain lies above 0.
        always: The single answer that the model gives to every question; None where it gives several.
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
        """Return what a table says of a score that guessing reaches; empty where the score is above it."""
        if self.above:
            return ""
        reached = self.hindsight if self.majority is None else self.majority
        always = f"always says {self.always}: " if self.always else ""
        return f"{always}not above {100 * reached:.1f} % by guessing"


class Calibration(Part):
    """How far the probabilities of the given answers can be trusted. All values are shares; none has an interval.

    Attributes:
        expected_error: Expected calibration error of the likeliest candidate, over ten bins of equal mass.
        brier: The Brier score of the last of two classes; None where there are more than two.
        reliability: The part of the Brier score that calibration would remove.
        resolution: The part by which forecasts tell questions apart; it lowers the Brier score.
        uncertainty: The part that the base rate alone causes.
        risk_coverage_area: The mean share of wrong answers among the surest, over all coverages.
        accuracy_at_80: The share of right answers among the surest 80 %.
        accuracy_at_90: The share of right answers among the surest 90 %.
        temperature: The temperature fitted on validation questions; None where there are none.
        scaled_error: The expected calibration error at this temperature.
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
    """How many answers to questions with options choose one option, none, or several. Only the first kind can be
    right."""

    parsed: int
    unparsed: int
    ambiguous: int


class Curves(Part):
    """The curves from which a task's plots are drawn, thinned to at most 101 points each. All values are shares.

    Attributes:
        roc: (false positive rate, true positive rate) of a class against the rest, by class: with two classes only the
            last one, with more at most the six commonest.
        reliability: Bins of equal mass, in the order of confidence.
        risk_coverage: (share of questions answered, share of these that is wrong), surest first.
    """

    roc: dict[str, tuple[tuple[float, float], ...]]
    reliability: tuple[ReliabilityPoint, ...]
    risk_coverage: tuple[tuple[float, float], ...]


class ClosedMeasured(Part):
    """Closed questions together, of a task or of one text.

    Attributes:
        question: The text that all questions share; None where all of a task's questions stand together.
        questions: Number of questions.
        groups: Number of images or patients.
        classes: The true answers.
        confusion: True class × said class. The last column holds answers of no class, which never count as right.
        calibration: Calibration of the candidates' probabilities; None without them.
        choices: How answers to questions with options were read; None without such questions.
        curves: Curves of all of a task's questions; None without probabilities.
        figures: Figures by name, from `metrics.closed.confusion_figures` and `metrics.discrimination`.
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


class LabelSetsMeasured(Part):
    """Questions whose answer is a set of labels, in any order.

    Attributes:
        f1: Mean F1 of the sets.
        exact: Share of sets that equal the true one.
        by_label: The commonest labels, at most 50.
    """

    questions: int
    f1: Measured
    exact: Measured
    by_label: tuple[LabelMeasured, ...]


class GroupMeasured(Part):
    """Closed questions about one group of patients.

    Attributes:
        score: Share of right answers; None for fewer than ten patients.
        p: The p-value that the group scores like all others, by permutation of patients' labels, adjusted by Holm's
            method; None where labels differ within a patient.
        guess: Score of the best constant answer to each question within the group; None in files of earlier versions.
    """

    questions: int
    patients: int
    score: Measured | None
    p: float | None
    guess: float | None = None


class AttributeMeasured(Part):
    """Closed questions by the values of an attribute.

    Attributes:
        groups: Results by value, or by band of a number.
        worst: The scored group with the lowest score; null where fewer than two are scored.
        gap: The largest score minus the lowest, with an interval by resampling of patients.
        association: Cramér's V of attribute and true answer: near 1, the attribute alone predicts the answer.
        missing: Number of questions whose records do not have the attribute.
        alone: Score of whoever sees nothing but question and attribute: the best constant answer within each group.
            None in files of earlier versions.
        shortcut: Whether `alone` is above one constant for all groups and the model's score is not above `alone`.
    """

    groups: dict[str, GroupMeasured]
    worst: str | None
    gap: Measured | None
    association: Measured
    missing: int
    alone: float | None = None
    shortcut: bool = False

    def in_words(self) -> str:
        """Return a warning of a shortcut; empty where there is none."""
        if not self.shortcut or self.alone is None:
            return ""
        return f"Shortcut: this attribute alone gives {100 * self.alone:.1f} %, which the model is not above"


class Clinical(StateFile):
    """The content of `clinical.json`: a file's closed questions together and by text, its counts, and its sets of
    labels; null where there are none.

    Attributes:
        subgroups: Subgroups of the closed questions, by attribute.
        texts_left_out: Number of question texts without an entry of their own because they have fewer than ten
            questions.
    """

    MEND: ClassVar[str] = "remove it; `mslora-cr score` or `mslora-cr evaluate` writes it again from the answers"

    confidence: float
    closed: ClosedMeasured | None
    by_question: tuple[ClosedMeasured, ...]
    texts_left_out: int
    counts: CountsMeasured | None
    label_sets: LabelSetsMeasured | None = None
    subgroups: dict[str, AttributeMeasured] = Field(default_factory=dict)
