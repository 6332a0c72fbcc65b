"""The ends of a confidence interval and what stands beside them; apart from the arithmetic, which needs SciPy."""

from __future__ import annotations

from typing import NamedTuple

Interval = tuple[float, float]


class PairedChange(NamedTuple):
    """A paired difference with all that is known of it.

    Attributes:
        ends: of its interval, in points.
        gained: questions whose score rose.
        lost: questions whose score fell.
        questions: in all.
        most_lost: one-sided upper bound, in percent, of the share of questions whose score falls.
        p: of the exact McNemar test.
        freedom: degrees of freedom; None of a difference that is zero by construction.
        largest: the largest cluster's share; None likewise.
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
        """`2 of 80 changed`, with the bound of losses and the test; empty where nothing could change."""
        if self.freedom is None:
            return ""
        changed = self.gained + self.lost
        p = f"p {self.p:.3f}" if self.p >= 0.0005 else "p < 0.001"
        bound = f"at most {self.most_lost:.1f} % lost"
        return f"{changed} of {self.questions} {verb} (+{self.gained}, -{self.lost}), {bound}, McNemar {p}"

    def precision(self) -> str:
        """Degrees of freedom and the largest cluster's share."""
        return "" if self.freedom is None or self.largest is None else precision(self.freedom, self.largest)


def precision(freedom: float, largest: float) -> str:
    """The basis of an interval, as text."""
    return f"{freedom:.0f} degrees of freedom, largest cluster {100 * largest:.1f} %"


def counted(changed: int | None, questions: int | None, verb: str = "changed") -> str:
    """How many answers changed, where an earlier version noted no more; empty where it counted none."""
    return "" if changed is None else f"{changed} of {questions} {verb}"


def bracketed(ends: Interval | None, *notes: str) -> str:
    """An interval in brackets, with what is to be said of it; empty where nothing is known."""
    remarks = "; ".join(text for text in (span(ends), *notes) if text)
    return f" [{remarks}]" if remarks else ""


def span(ends: Interval | None, digits: int = 1) -> str:
    """An interval's ends as text; empty without one."""
    # Adding zero turns -0.0, which rounding leaves, into 0.0.
    return "" if ends is None else " to ".join(f"{round(end, digits) + 0:.{digits}f}" for end in ends)
