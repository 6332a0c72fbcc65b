"""Answers that are counts: how far off they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mslora_cr.metrics.measured import CountsMeasured, Measured
from mslora_cr.metrics.words import DIGITS, plain_number
from mslora_cr.statistics.intervals import Groups, Scores, estimate, score_interval
from mslora_cr.statistics.sample_size import FEWEST, FEWEST_SHARED

_WORD_OR_NUMBER = re.compile(rf"(?P<word>[a-z]+)|(?P<sign>(?<!\w)[-+\u2212])?(?P<digits>{DIGITS})")
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NEAR = 1
"""A count that is off by at most this is nearly right."""
ERROR = "mean absolute error"
"""Name of the figure, whose unit is that of the counts; lower is better."""


def number_in(text: str) -> float | None:
    """Return the first number of a text, in digits or, up to twelve, in words; None where there is none."""
    for found in _WORD_OR_NUMBER.finditer(text.lower()):
        if found["word"] in _WORDS:
            return float(_WORDS.index(found["word"]))
        if found["digits"] and (plain := plain_number(found["digits"])).count(".") < 2:
            return -float(plain) if found["sign"] in ("-", "\u2212") else float(plain)
    return None


def is_count(truth: str) -> bool:
    """Return whether a true answer is a whole number and nothing else."""
    return re.fullmatch(r"\s*\+?\d{1,9}\s*", truth) is not None or truth.strip().lower() in _WORDS


def count_figures(answers: Sequence[str], truths: Sequence[str], groups: Groups) -> CountsMeasured:
    """Compute the mean absolute error and the shares that are exactly and nearly right.

    Args:
        groups: (questions,), the number of each question's image or patient.
    """
    errors = absolute_errors(answers, truths)
    numeric = ~np.isnan(errors)
    error = None
    if numeric.any():
        off = errors[numeric]
        largest = float(off.max()) or 1.0
        mean = estimate(off / largest, groups[numeric])
        low, high = score_interval([mean])
        has_interval = mean.questions >= FEWEST and mean.variance > 0
        ends = (largest * low, largest * high) if has_interval else None
        error = Measured(value=largest * mean.mean, interval=ends)
    exact, near = (share_of(errors <= most, groups) for most in (0, NEAR))
    return CountsMeasured(
        questions=len(answers),
        unparsed=int((~numeric).sum()),
        mean_absolute_error=error,
        exact=exact,
        near=near,
    )


def absolute_errors(answers: Sequence[str], truths: Sequence[str]) -> NDArray[np.float64]:
    """Return how far each answer's number is from the true one, (questions,); NaN where the answer has no number."""
    said, true = (np.array([number_in(text) for text in texts], dtype=np.float64) for texts in (answers, truths))
    return np.abs(said - true)


def share_of(right: NDArray[np.bool_] | Scores, groups: Groups) -> Measured:
    """Return a share with its interval, if there are at least `FEWEST` questions and, where these share images, at
    least `FEWEST_SHARED` images of one size."""
    share = estimate(right.astype(np.float64), groups)
    enough = share.groups == share.questions or share.effective >= FEWEST_SHARED
    ends = score_interval([share]) if enough and share.questions >= FEWEST else None
    return Measured(value=share.mean, interval=ends)
