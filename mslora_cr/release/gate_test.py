"""The result of one test of the gate."""

from __future__ import annotations

from typing import Literal

from mslora_cr.utils.state import Part

Verdict = Literal["release", "hold", "reject"]
Outcome = Literal["pass", "hold", "fail", "counted"]
Tested = Literal["earlier task", "new task", "probe", "subgroup", "calibration", "foreign questions"]


class GateTest(Part):
    """One test of a gate, in points.

    Attributes:
        what: What is tested.
        name: The task, with the group of patients for a subgroup, or the held-out data set.
        outcome: `pass`; `hold`, where too few patients leave it open; `fail`; `counted`, where the plan judges no group
            of so few patients.
        reason: The outcome in words.
        required: What the lower bound must exceed: minus the margin, or the required score.
        reference: The score that the new one is compared with, in percent; None for a required score.
        score: The score of the update, in percent; a calibration error or a share of questions, likewise.
        difference: The score less its reference, or less the required score; what must be small, how far below its
            limit it is.
        bound: The one-sided lower bound of the difference.
        level: The level of the test.
        p: The p-value.
        questions: How many questions were answered.
        groups: How many of them are independent, by patient or image.
        gained: How many score higher than in the reference.
        lost: How many score lower.
        needed: How many groups would pass with a power of 80 % if nothing else changes; None where no number would.
    """

    what: Tested
    name: str
    outcome: Outcome
    reason: str
    required: float
    reference: float | None
    score: float
    difference: float
    bound: float
    level: float
    p: float
    questions: int
    groups: int
    gained: int
    lost: int
    needed: int | None


def too_few(groups: int, least: int) -> str:
    """Return the reason to hold where there are fewer patients than a plan asks for."""
    return f"{groups} independent patients or images; the plan asks for {least}, {least - groups} more"
