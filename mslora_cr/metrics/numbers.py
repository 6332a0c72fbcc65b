"""Answers that are counts: how far off they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mslora_cr.metrics.measured import CountsMeasured, Measured
from mslora_cr.statistics.intervals import Groups, estimate, mean_interval, score_interval

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
FEWEST = 10
NEAR = 1
"""A count that is off by at most this is nearly right."""


def number_in(text: str) -> float | None:
    """Return the first number of a text, in digits or, up to twelve, in words; None where there is none."""
    for word in re.findall(r"[+-]?\d+(?:\.\d+)?|[a-z]+", text.lower()):
        if word in _WORDS:
            return float(_WORDS.index(word))
        if _NUMBER.fullmatch(word):
            return float(word)
    return None


def is_count(truth: str) -> bool:
    """Return whether a true answer is a whole number and nothing else."""
    return re.fullmatch(r"\s*\+?\d{1,9}\s*", truth) is not None or truth.strip().lower() in _WORDS


def count_figures(answers: Sequence[str], truths: Sequence[str], groups: Groups) -> CountsMeasured:
    """Compute the mean absolute error and the shares that are exactly and nearly right.

    Args:
        groups: (questions,), the number of each question's image or patient.
    """
    said = np.array([value if (value := number_in(answer)) is not None else np.nan for answer in answers])
    true = np.array([number_in(truth) for truth in truths], dtype=np.float64)
    numeric = ~np.isnan(said)
    error = None
    if numeric.any():
        off = np.abs(said - true)[numeric]
        largest = float(off.max()) or 1.0
        mean = estimate(off / largest, groups[numeric])
        low, high = mean_interval(mean)
        has_interval = mean.questions >= FEWEST and mean.variance > 0
        ends = (largest * max(0.0, low), largest * high) if has_interval else None
        error = Measured(value=largest * mean.mean, interval=ends)
    exact, near = (share_of(np.abs(said - true) <= most, groups) for most in (0, NEAR))
    return CountsMeasured(
        questions=len(answers),
        unparsed=int((~numeric).sum()),
        mean_absolute_error=error,
        exact=exact,
        near=near,
    )


def share_of(right: NDArray[np.bool_], groups: Groups) -> Measured:
    """Return a share with its interval, if there are at least `FEWEST` questions."""
    share = estimate(right.astype(np.float64), groups)
    return Measured(value=share.mean, interval=score_interval([share]) if share.questions >= FEWEST else None)
