"""What metrics measure, as `clinical.json` stores it."""

from __future__ import annotations

from mslora_cr.statistics.interval import Interval
from mslora_cr.utils.state import Part


class Measured(Part):
    """A value, in [0, 1] (Matthews' correlation in [-1, 1], a count's error in its own unit), and the ends of its 95 %
    interval; null where too few questions carry one."""

    value: float
    interval: Interval | None


class ReliabilityPoint(Part):
    """A bin of a reliability diagram: mean confidence, share of right answers, number of questions."""

    confidence: float
    accuracy: float
    questions: int


class CountsMeasured(Part):
    """Questions whose true answers are numbers.

    Attributes:
        unparsed: Number of answers without a number.
        mean_absolute_error: Error of the other answers, with Wilson's interval of its share of the largest error.
        exact: Share of answers that is right.
        near: Share of answers that is off by at most one; None in files of earlier versions.
    """

    questions: int
    unparsed: int
    mean_absolute_error: Measured | None
    exact: Measured
    near: Measured | None = None


class LabelMeasured(Part):
    """A label of sets.

    Attributes:
        questions: Number of questions whose true set has the label.
        said: Number of answers that name the label.
        sensitivity: Share of the questions whose set has the label for which the answer names it.
        specificity: Share of the other questions for which the answer does not name it.
    """

    name: str
    questions: int
    said: int
    sensitivity: Measured | None
    specificity: Measured | None
