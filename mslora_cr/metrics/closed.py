"""Closed questions as a clinical reader sees them: which class was said, and recall, precision and agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mslora_cr.data.answers.options import letter_of
from mslora_cr.metrics.measured import Measured
from mslora_cr.metrics.numbers import share_of
from mslora_cr.metrics.options import parse_choice
from mslora_cr.metrics.published import normalize_answer
from mslora_cr.metrics.words import number_words, without_number_words
from mslora_cr.statistics.interval import Interval
from mslora_cr.statistics.intervals import Groups, Scores
from mslora_cr.statistics.linearised import bounded_interval
from mslora_cr.statistics.sample_size import FEWEST

YES, NO = "yes", "no"
NEGATIVE = {NO, "normal", "negative", "benign", "absent", "healthy"}
"""The class of one of these names is the negative one of two."""

LOWEST = {"Matthews' correlation": -1.0}
"""The lowest value of figures whose lowest value is not 0."""

Classes = NDArray[np.int64]
"""The place of each question's class in a list of classes; one more than the last place is `no answer of the set`."""


class Confusion(NamedTuple):
    """Answers to closed questions.

    Attributes:
        names: Names of the classes, which are the true answers.
        truth: (questions,), the true class.
        said: (questions,), the class that was said.
        groups: (questions,), the number of each question's image or patient.
    """

    names: tuple[str, ...]
    truth: Classes
    said: Classes
    groups: Groups

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return the table true class × said class, (classes, classes + 1); answers of no class stand in the last
        column."""
        size = len(self.names)
        flat = np.bincount(self.truth * (size + 1) + self.said, minlength=size * (size + 1))
        return flat.reshape(size, size + 1)

    @property
    def has_positive(self) -> bool:
        """Return whether there are two classes, a negative and a positive one, in this order."""
        return len(self.names) == 2 and [name in NEGATIVE for name in self.names] == [True, False]

    @property
    def varies(self) -> bool:
        """Return whether there is more than one class among truths and answers; otherwise they cannot correlate."""
        return len({*self.truth.tolist(), *self.said.tolist()}) > 1

    @property
    def right(self) -> Scores:
        return (self.truth == self.said).astype(np.float64)


def confusion(
    answers: Sequence[str],
    truths: Sequence[Sequence[str]],
    groups: Groups,
    options: Sequence[Mapping[str, str]] | None = None,
) -> Confusion:
    """Determine the class that each answer says (`said_class`). Where several truths are accepted, the one that was
    said is the true one.

    Args:
        truths: All accepted answers to each question.
        groups: (questions,), the number of each question's image or patient.
        options: The options of each question, by letter; empty where it has none.
    """
    offered = options or [{}] * len(answers)
    said, true = [], []
    for answer, every, choices in zip(answers, truths, offered, strict=True):
        accepted = [class_of(truth, choices) for truth in every]
        said.append(said_class(answer, every, choices))
        true.append(said[-1] if said[-1] in accepted else accepted[0])
    names = tuple(sorted(set(true), key=lambda name: (name not in NEGATIVE, name)))
    if set(names) <= {YES, NO}:
        names = (NO, YES)
    columns = {name: column for column, name in enumerate(names)}
    return Confusion(
        names,
        truth=np.array([columns[name] for name in true], dtype=np.int64),
        said=np.array([columns.get(name, len(names)) for name in said], dtype=np.int64),
        groups=groups,
    )


def class_of(truth: str, options: Mapping[str, str]) -> str:
    """Return the class for which a true answer or a candidate stands: its text, normalised as the published evaluation
    does except in its numbers (`number_words`), or the text of the option whose letter or text it is."""
    letter = letter_of(truth, options) if options else None
    written = number_words((options[letter] if letter else truth).lower())
    return without_number_words(normalize_answer(written)) or truth.strip().lower()


def said_class(answer: str, truths: Sequence[str], options: Mapping[str, str]) -> str:
    """Return the class that an answer says; "" where it chooses none of the options, or several.

    An answer says a class if both are equal once normalised as the published evaluation does. A question with options
    is answered by letter or text (`parse_choice`). An answer to a yes-or-no question says one of the two words if it
    begins with this word and does not contain the other. A class is never searched for inside an answer: `no pneumonia`
    is not `pneumonia`.
    """
    if options:
        letter = parse_choice(answer, options).letter
        return class_of(letter, options) if letter else ""
    said = class_of(answer, {})
    return _yes_or_no(said) if {class_of(truth, {}) for truth in truths} <= {YES, NO} else said


def _yes_or_no(said: str) -> str:
    words = said.split()
    first = words[0] if words else ""
    other = {YES: NO, NO: YES}.get(first)
    return first if other is not None and other not in words else said


def confusion_figures(table: Confusion) -> dict[str, Measured]:
    """Return accuracy, balanced accuracy, macro F1 and Matthews' correlation, by scikit-learn; where one of two classes
    is negative (`NEGATIVE`), also sensitivity, specificity, PPV and NPV.

    Balanced accuracy, F1 and Matthews' correlation have intervals by linearisation (`bounded_interval`); the shares
    have Wilson's intervals. Both respect images and patients. Measureds that rest on a class with fewer than `FEWEST`
    questions have none. Sources: Brodersen et al., "The Balanced Accuracy and Its Posterior Distribution", ICPR 2010;
    Gorodkin, "Comparing Two K-Category Assignments by a K-Category Correlation Coefficient", Computational Biology and
    Chemistry 2004; Maier-Hein et al., "Metrics Reloaded", Nature Methods 2024.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

    labels = list(range(len(table.names)))
    asked = [label for label in labels if (table.truth == label).any()]
    enough = min(int((table.truth == label).sum()) for label in labels) >= FEWEST
    figures = {"accuracy": share_of(table.right, table.groups)}
    scores = {
        "balanced accuracy": recall_score(table.truth, table.said, labels=asked, average="macro", zero_division=0),
        "macro F1": f1_score(table.truth, table.said, labels=asked, average="macro", zero_division=0),
        "Matthews' correlation": matthews_corrcoef(table.truth, table.said) if table.varies else 0.0,
    }
    for name, value in scores.items():
        ends = _linearised(table, name, float(value)) if enough and len(asked) > 1 else None
        figures[name] = Measured(value=float(value), interval=ends)
    if table.has_positive:
        for name, (column, of) in _SHARES.items():
            where = (table.truth if of == "truth" else table.said) == column
            if where.any():
                figure = share_of(table.right[where], table.groups[where])
                figures[name] = figure if enough else figure.model_copy(update={"interval": None})
    return figures


_SHARES = {"sensitivity": (1, "truth"), "specificity": (0, "truth"), "PPV": (1, "said"), "NPV": (0, "said")}


def class_figures(table: Confusion) -> dict[str, tuple[Measured | None, Measured | None]]:
    """Return recall and precision by class; None where the class was never true or never said."""
    return {
        name: (_part(table, table.truth == column), _part(table, table.said == column))
        for column, name in enumerate(table.names)
    }


def _part(table: Confusion, where: NDArray[np.bool_]) -> Measured | None:
    return share_of(table.right[where], table.groups[where]) if where.any() else None


# --- intervals of what is no mean -------------------------------------------------------------------------------------


def _balanced(counts: Scores) -> Scores:
    return (_diagonal(counts) / counts.sum(axis=-1)).mean(axis=-1)


def _macro_f1(counts: Scores) -> Scores:
    said = counts[..., : counts.shape[-2]].sum(axis=-2)
    return (2 * _diagonal(counts) / (counts.sum(axis=-1) + said)).mean(axis=-1)


def _matthews(counts: Scores) -> Scores:
    total, true, said = counts.sum(axis=(-1, -2)), counts.sum(axis=-1), counts.sum(axis=-2)
    agreed = _diagonal(counts).sum(axis=-1) * total - (true * said[..., : true.shape[-1]]).sum(axis=-1)
    spread = (total**2 - np.square(true).sum(axis=-1)) * (total**2 - np.square(said).sum(axis=-1))
    return np.where(spread > 0, agreed / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


def _diagonal(counts: Scores) -> Scores:
    return np.diagonal(counts, axis1=-2, axis2=-1)


_FUNCTIONS: dict[str, Callable[[Scores], Scores]] = {
    "balanced accuracy": _balanced,
    "macro F1": _macro_f1,
    "Matthews' correlation": _matthews,
}


def influences(table: Confusion, name: str) -> Scores:
    """Return how far each question moves `balanced accuracy`, `macro F1` or `Matthews' correlation`, (questions,): the
    slope of the figure along the question's cell of the confusion, times the number of questions. The mean is 0."""
    function, counts, step = _FUNCTIONS[name], table.counts.astype(np.float64), 1e-4
    moved = step * np.eye(counts.size).reshape(-1, *counts.shape)
    slopes = (function(counts + moved) - function(counts - moved)) / (2 * step)
    cells = table.truth * counts.shape[1] + table.said
    return slopes[cells] * len(cells)


def _linearised(table: Confusion, name: str, value: float) -> Interval | None:
    smallest = int(table.counts.sum(axis=1).min())
    return bounded_interval(value, influences(table, name), table.groups, (LOWEST.get(name, 0.0), 1.0), smallest - 1)
