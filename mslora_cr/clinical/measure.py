"""Measures a file of answers as a clinical reader would: `clinical.json` beside `metrics.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mslora_cr.clinical.asked import AskedAnswer, right_of
from mslora_cr.clinical.file import (
    Calibration,
    ChoicesMeasured,
    ClassMeasured,
    Clinical,
    ClosedMeasured,
    Curves,
    Guessing,
    LabelSetsMeasured,
)
from mslora_cr.clinical.groups import by_attribute
from mslora_cr.metrics.by_class import AUROC, AVERAGE_PRECISION, macro_areas
from mslora_cr.metrics.calibration import (
    accuracy_at_coverage,
    brier_decomposition,
    expected_calibration_error,
    reliability_bins,
    risk_coverage,
)
from mslora_cr.metrics.closed import (
    Confusion,
    class_figures,
    class_of,
    confusion,
    confusion_figures,
)
from mslora_cr.metrics.discrimination import auroc, average_precision
from mslora_cr.metrics.guessing import (
    Frequencies,
    hindsight_guesses,
    majority_guesses,
    question_key,
)
from mslora_cr.metrics.measured import CountsMeasured, Measured
from mslora_cr.metrics.numbers import count_figures, number_in
from mslora_cr.metrics.options import counts_of, parse_choice
from mslora_cr.metrics.published import normalize_answer
from mslora_cr.metrics.typed import MOST_LABELS, label_figures, label_set, set_f1
from mslora_cr.statistics.interval import CONFIDENCE
from mslora_cr.statistics.intervals import Groups, Scores, estimate, score_interval
from mslora_cr.statistics.paired import paired_change, paired_task

FEWEST = 10
"""A question text has an entry of its own from this many questions on."""


def clinical_of(
    asked: Sequence[AskedAnswer],
    groups: Groups,
    training: Frequencies | None = None,
    temperature: float | None = None,
) -> Clinical:
    """Compute the content of `clinical.json`.

    Args:
        groups: (questions,), the number of each question's image or patient.
        training: How often each answer follows each question in training.
        temperature: The temperature of the candidates' probabilities, fitted on validation questions; None where there
            are none.
    """
    closed = [index for index, one in enumerate(asked) if one.closed and one.kind == "choice"]
    texts: dict[str, list[int]] = {}
    for index in closed:
        texts.setdefault(question_key(asked[index].question), []).append(index)
    counted = [
        index for index, one in enumerate(asked) if one.kind == "number" and number_in(one.truths[0]) is not None
    ]
    labelled = [index for index, one in enumerate(asked) if one.kind == "set"]
    frequent = [indices for indices in texts.values() if len(indices) >= FEWEST]
    return Clinical(
        confidence=CONFIDENCE,
        closed=_closed(asked, closed, groups, training, None, temperature) if closed else None,
        by_question=tuple(
            _closed(asked, indices, groups, training, asked[indices[0]].question, temperature)
            for indices in sorted(frequent, key=len, reverse=True)
        ),
        texts_left_out=len(texts) - len(frequent),
        counts=_counts(asked, counted, groups) if counted else None,
        label_sets=_label_sets(asked, labelled, groups) if labelled else None,
        subgroups=by_attribute([asked[index] for index in closed], groups[closed]) if closed else {},
    )


def _closed(
    asked: Sequence[AskedAnswer],
    indices: Sequence[int],
    groups: Groups,
    training: Frequencies | None,
    question: str | None,
    temperature: float | None,
) -> ClosedMeasured:
    chosen = [asked[index] for index in indices]
    clusters = np.unique(groups[list(indices)], return_inverse=True)[1]
    table = confusion(
        [one.answer for one in chosen], [one.truths for one in chosen], clusters, [o.options for o in chosen]
    )
    chances = _chances(chosen, table)
    areas = _areas(table, chances) if chances is not None else {}
    by_class = class_figures(table)
    counts = table.counts
    return ClosedMeasured(
        question=question,
        questions=len(chosen),
        groups=int(clusters.max()) + 1,
        classes=table.names,
        confusion=tuple(tuple(int(count) for count in row) for row in counts),
        figures=confusion_figures(table) | (_macro(table, chances, areas) if chances is not None else {}),
        by_class=tuple(
            ClassMeasured(
                name=name,
                questions=int(counts[index].sum()),
                said=int(counts[:, index].sum()),
                recall=recall,
                precision=precision,
                auroc=areas[name][0] if name in areas else None,
                average_precision=areas[name][1] if name in areas else None,
            )
            for index, (name, (recall, precision)) in enumerate(by_class.items())
        ),
        guessing=_guessing(chosen, clusters, training),
        choices=_choices(chosen),
        calibration=None if chances is None else _calibration(chosen, table, chances, temperature),
        curves=None if chances is None or question is not None else curves_of(table, chances),
    )


def _calibration(
    chosen: Sequence[AskedAnswer], answered: Confusion, chances: Scores, temperature: float | None
) -> Calibration:
    """Return the calibration of the likeliest candidate, and the parts of the Brier score of the last of two classes
    (yes)."""
    scaled = None if temperature is None else _chances([one.at(temperature) for one in chosen], answered)
    likeliest, confidence = chances.argmax(1), chances.max(1)
    right = (likeliest == answered.truth).astype(np.float64)
    binary = len(answered.names) == 2
    parts = brier_decomposition(chances[:, 1], (answered.truth == 1).astype(np.float64)) if binary else None
    return Calibration(
        temperature=temperature,
        scaled_error=None if scaled is None else expected_calibration_error(scaled.max(1), right),
        expected_error=expected_calibration_error(confidence, right),
        brier=parts.score if parts else None,
        reliability=parts.reliability if parts else None,
        resolution=parts.resolution if parts else None,
        uncertainty=parts.uncertainty if parts else None,
        risk_coverage_area=float(risk_coverage(confidence, right).mean()),
        accuracy_at_80=accuracy_at_coverage(confidence, right, 0.8),
        accuracy_at_90=accuracy_at_coverage(confidence, right, 0.9),
    )


def _chances(chosen: Sequence[AskedAnswer], table: Confusion) -> Scores | None:
    """Return the probability of each class, (questions, classes); None where one question's are unknown."""
    rows = []
    for one in chosen:
        if one.probabilities is None:
            return None
        named = {class_of(text, one.options): p for text, p in one.probabilities.items()}
        rows.append([named.get(name, 0.0) for name in table.names])
    return np.array(rows)


def _areas(table: Confusion, chances: Scores) -> dict[str, tuple[Measured, Measured]]:
    """Return AUROC and average precision of each class against the rest, where there are questions of both."""
    areas = {}
    for column, name in enumerate(table.names):
        positive = table.truth == column
        if positive.any() and not positive.all():
            area = auroc(positive, chances[:, column], table.groups)
            precision = average_precision(positive, chances[:, column], table.groups)
            areas[name] = area, precision
    return areas


def _macro(table: Confusion, chances: Scores, areas: Mapping[str, tuple[Measured, Measured]]) -> dict[str, Measured]:
    """Return the last class's figures of two classes (yes), or the means over more classes."""
    if len(areas) == 2:
        return dict(zip((AUROC, AVERAGE_PRECISION), list(areas.values())[-1], strict=True))
    return macro_areas(table, chances)


def _guessing(chosen: Sequence[AskedAnswer], groups: Groups, training: Frequencies | None) -> Guessing:
    questions = [one.question for one in chosen]
    right = right_of(chosen, [one.answer for one in chosen])
    hindsight = right_of(chosen, hindsight_guesses(questions, [one.truths[0] for one in chosen]))
    majority, unseen = None, None
    if training is not None:
        guesses = majority_guesses(questions, training)
        if guesses.unseen < len(questions):
            majority, unseen = right_of(chosen, [guess or "" for guess in guesses.answers]), guesses.unseen
    gain = paired_change([paired_task(right - (hindsight if majority is None else majority), groups, binary=True)])
    said = Counter(normalize_answer(one.answer.lower()) for one in chosen)
    return Guessing(
        score=float(right.mean()),
        majority=None if majority is None else float(majority.mean()),
        hindsight=float(hindsight.mean()),
        unseen=unseen,
        gain=100 * float(right.mean() - (hindsight if majority is None else majority).mean()),
        interval=gain.ends,
        above=gain.ends[0] > 0,
        always=next(iter(said)) if len(said) == 1 else None,
    )


def _counts(asked: Sequence[AskedAnswer], indices: Sequence[int], groups: Groups) -> CountsMeasured:
    chosen = [asked[index] for index in indices]
    clusters = np.unique(groups[list(indices)], return_inverse=True)[1]
    return count_figures([one.answer for one in chosen], [one.truths[0] for one in chosen], clusters)


def _label_sets(asked: Sequence[AskedAnswer], indices: Sequence[int], groups: Groups) -> LabelSetsMeasured:
    chosen = [asked[index] for index in indices]
    clusters = np.unique(groups[list(indices)], return_inverse=True)[1]
    said, true = [label_set(one.answer) for one in chosen], [label_set(one.truths[0]) for one in chosen]
    scores = np.array([set_f1(*pair) for pair in zip(said, true, strict=True)])
    right = np.array([float(one == other) for one, other in zip(said, true, strict=True)])
    f1, exact = (estimate(values, clusters) for values in (scores, right))
    return LabelSetsMeasured(
        questions=len(chosen),
        f1=Measured(value=f1.mean, interval=score_interval([f1])),
        exact=Measured(value=exact.mean, interval=score_interval([exact])),
        by_label=label_figures(said, true, clusters, MOST_LABELS),
    )


def _choices(chosen: Sequence[AskedAnswer]) -> ChoicesMeasured | None:
    """Count how answers to questions with options were read; None without such questions."""
    parsed = [parse_choice(one.answer, one.options) for one in chosen if one.options]
    return ChoicesMeasured(**counts_of(parsed)) if parsed else None


MOST_POINTS = 101
MOST_CLASSES = 6
DIGITS = 4


def curves_of(answered: Confusion, chances: Scores) -> Curves:
    """Return the curves of the likeliest candidate, and the ROC curve of each class against the rest.

    Args:
        answered: The questions with their true classes.
        chances: (questions, classes), the probability of each class.
    """
    confidence, right = chances.max(1), (chances.argmax(1) == answered.truth).astype(np.float64)
    risks = risk_coverage(confidence, right)
    covered = np.arange(1, len(risks) + 1) / len(risks)
    counts = np.bincount(answered.truth, minlength=len(answered.names))
    binary = len(answered.names) == 2
    columns = [1] if binary else sorted(np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist())
    return Curves(
        roc={
            answered.names[column]: _roc(answered.truth == column, chances[:, column])
            for column in columns
            if 0 < counts[column] < len(answered.truth)
        },
        reliability=tuple(reliability_bins(confidence, right)),
        risk_coverage=_points(covered, risks),
    )


def _roc(positive: np.ndarray, scores: Scores) -> tuple[tuple[float, float], ...]:
    from sklearn.metrics import roc_curve

    false_rate, true_rate, _ = roc_curve(positive, scores)
    return _points(false_rate, true_rate)


def _points(across: Scores, up: Scores) -> tuple[tuple[float, float], ...]:
    """Thin a curve to at most `MOST_POINTS` points; both ends stay."""
    chosen = np.unique(np.linspace(0, len(across) - 1, MOST_POINTS).round().astype(int))
    return tuple((round(float(across[i]), DIGITS), round(float(up[i]), DIGITS)) for i in chosen)
