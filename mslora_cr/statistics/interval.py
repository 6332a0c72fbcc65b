"""Confidence intervals as data and text; the arithmetic, which needs SciPy, is elsewhere."""

from __future__ import annotations

from typing import NamedTuple

Interval = tuple[float, float]

CONFIDENCE = 0.95
"""Of every interval."""


class PairedChange(NamedTuple):
    """A paired difference with everything known about it.

    Attributes:
        ends: The ends of its interval, in points.
        gained: The number of questions whose score rose.
        lost: The number of questions whose score fell.
        most_lost: A one-sided upper bound, in percent, of the share of questions whose score falls.
        p: The p-value of the exact McNemar test.
        freedom: The degrees of freedom; None for a difference that is zero by construction.
        largest: The largest cluster's share; None likewise.
    """

    ends: Interval
    gained: int
    lost: int
    questions: int
    most_lost: float
    p: float
    freedom: float | None
    largest: float | None

    def counted(self, verb: str = "changed") -> str:
        """Return `2 of 80 changed`, with the bound of losses and the test; empty if nothing can change."""
        if self.freedom is None:
            return ""
        changed = self.gained + self.lost
        p = f"p {self.p:.3f}" if self.p >= 0.0005 else "p < 0.001"
        bound = f"at most {self.most_lost:.1f} % lost"
        return f"{changed} of {self.questions} {verb} (+{self.gained}, -{self.lost}), {bound}, McNemar {p}"

    def precision(self) -> str:
        """Return the degrees of freedom and the largest cluster's share."""
        return "" if self.freedom is None or self.largest is None else precision(self.freedom, self.largest)


def precision(freedom: float, largest: float) -> str:
    """Return the degrees of freedom and the largest cluster's share, as text."""
    return f"{freedom:.0f} degrees of freedom, largest cluster {100 * largest:.1f} %"


def counted(changed: int | None, questions: int | None, verb: str = "changed") -> str:
    """Return how many answers changed, for files of earlier versions, which note no more; empty if none was counted."""
    return "" if changed is None else f"{changed} of {questions} {verb}"


def bracketed(ends: Interval | None, *notes: str) -> str:
    """Return an interval in brackets, with its notes; empty if it is unknown."""
    remarks = "; ".join(text for text in (span(ends), *notes) if text)
    return f" [{remarks}]" if remarks else ""


def span(ends: Interval | None, digits: int = 1) -> str:
    """Return an interval's ends as text; empty without one."""
    # Adding zero turns -0.0, which rounding may leave, into 0.0.
    return "" if ends is None else " to ".join(f"{round(end, digits) + 0:.{digits}f}" for end in ends)
