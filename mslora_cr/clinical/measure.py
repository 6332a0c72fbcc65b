"""Measure a file of answers as a clinical reader asks: `clinical.json` beside `metrics.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mslora_cr.clinical.file import (
    AttributeMeasured,
    Calibration,
    ClassMeasured,
    Clinical,
    ClosedMeasured,
    CountsMeasured,
    GroupMeasured,
    Guessing,
    Measured,
)
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.records import DataError, TestRecord, TrainingRecords
from mslora_cr.data.tasks import training_file
from mslora_cr.metrics.calibration import (
    accuracy_at_coverage,
    brier_decomposition,
    expected_calibration_error,
    risk_coverage,
)
from mslora_cr.metrics.closed import Confusion, Figure, class_figures, confusion, confusion_figures
from mslora_cr.metrics.discrimination import auroc, average_precision
from mslora_cr.metrics.guessing import (
    Frequencies,
    gives,
    hindsight_guesses,
    majority_guesses,
    question_key,
    training_answers,
)
from mslora_cr.metrics.numbers import count_figures, is_count
from mslora_cr.metrics.published import normalize_answer
from mslora_cr.statistics.association import cramers_v
from mslora_cr.statistics.intervals import CONFIDENCE, Groups, Scores
from mslora_cr.statistics.paired import paired_change, paired_task
from mslora_cr.statistics.subgroups import GroupScore, banded, subgroups

FEWEST = 10
"""Questions of one text from which on it has an entry of its own."""
MOST_TRAINING = 20_000
"""Training records that are read, a random sample of more."""


class AskedAnswer(NamedTuple):
    """A question with its answer.

    Attributes:
        question: its text.
        answer: the final part of what was said.
        truths: every accepted answer, the first one first.
        closed: whether it has a closed set of answers.
        options: by letter; empty where it offers none.
        kind: of the answer, where somebody says so.
        probabilities: of each candidate, by its text; None where they are not known.
        attributes: of patient and picture, by name.
    """

    question: str
    answer: str
    truths: tuple[str, ...]
    closed: bool
    options: Mapping[str, str]
    kind: str | None
    probabilities: Mapping[str, float] | None
    attributes: Mapping[str, str | int | float]


def training_frequencies(path: Path) -> Frequencies | None:
    """How often each answer follows each question in `train.json`; None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _frequencies(path, status.st_mtime_ns)


def task_frequencies(config: StreamConfig, task: Task) -> Frequencies | None:
    """Those of a task's training records, where they are at hand."""
    return training_frequencies(training_file(config, task))


@lru_cache(maxsize=32)
def _frequencies(path: Path, modified: int) -> Frequencies | None:
    try:
        return training_answers(TrainingRecords(path).thinned(MOST_TRAINING))
    except DataError:  # evaluating needs no training records
        return None


def asked_answers(
    answers: Sequence[tuple[str, str, str, bool]],
    records: Sequence[TestRecord] | None,
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
) -> list[AskedAnswer]:
    """Answers with what is known of their questions.

    Args:
        answers: question, answer, truth and whether it is closed.
        records: what was asked, in the same order; None where the answers alone are known.
        probabilities: by question, of each candidate.
    """
    by_answer = probabilities or [None] * len(answers)
    if records is None:
        return [
            AskedAnswer(question, final_answer(answer).text, _final([truth]), closed, {}, None, chances, {})
            for (question, answer, truth, closed), chances in zip(answers, by_answer, strict=True)
        ]
    return [
        AskedAnswer(
            record.text,
            final_answer(answer).text,
            _final(record.truths),
            closed,
            record.options,
            record.answer_kind,
            chances,
            record.attributes,
        )
        for (_, answer, _, closed), record, chances in zip(answers, records, by_answer, strict=True)
    ]


def _final(truths: Sequence[str]) -> tuple[str, ...]:
    return tuple(final_answer(truth).text for truth in truths)


def clinical_of(asked: Sequence[AskedAnswer], groups: Groups, training: Frequencies | None = None) -> Clinical:
    """The content of `clinical.json`.

    Args:
        asked: questions with their answers.
        groups: (questions,), by question the number of its image or patient.
        training: how often each answer follows each question in training.
    """
    closed = [index for index, one in enumerate(asked) if one.closed and one.kind in (None, "choice")]
    texts: dict[str, list[int]] = {}
    for index in closed:
        texts.setdefault(question_key(asked[index].question), []).append(index)
    counted = [
        index
        for index, one in enumerate(asked)
        if one.kind in (None, "number") and not one.options and is_count(one.truths[0])
    ]
    frequent = [indices for indices in texts.values() if len(indices) >= FEWEST]
    return Clinical(
        confidence=CONFIDENCE,
        closed=_closed(asked, closed, groups, training, None) if closed else None,
        by_question=tuple(
            _closed(asked, indices, groups, training, asked[indices[0]].question)
            for indices in sorted(frequent, key=len, reverse=True)
        ),
        texts_left_out=len(texts) - len(frequent),
        counts=_counts(asked, counted, groups) if counted else None,
        subgroups=_subgroups([asked[index] for index in closed], groups[closed]) if closed else {},
    )


def _closed(
    asked: Sequence[AskedAnswer],
    indices: Sequence[int],
    groups: Groups,
    training: Frequencies | None,
    question: str | None,
) -> ClosedMeasured:
    chosen = [asked[index] for index in indices]
    clusters = np.unique(groups[list(indices)], return_inverse=True)[1]
    table = confusion(
        [one.answer for one in chosen], [one.truths for one in chosen], clusters, [o.options for o in chosen]
    )
    chances = _chances(chosen, table)
    areas = _areas(table, chances) if chances is not None else {}
    figures = {name: _measured(figure) for name, figure in confusion_figures(table).items()}
    by_class = class_figures(table)
    counts = table.counts
    return ClosedMeasured(
        question=question,
        questions=len(chosen),
        groups=int(clusters.max()) + 1,
        classes=table.names,
        confusion=tuple(tuple(int(count) for count in row) for row in counts),
        figures=figures | _macro(areas),
        by_class=tuple(
            ClassMeasured(
                name=name,
                questions=int(counts[index].sum()),
                said=int(counts[:, index].sum()),
                recall=_measured(recall) if recall else None,
                precision=_measured(precision) if precision else None,
                auroc=areas[name][0] if name in areas else None,
                average_precision=areas[name][1] if name in areas else None,
            )
            for index, (name, (recall, precision)) in enumerate(by_class.items())
        ),
        guessing=_guessing(chosen, clusters, training),
        calibration=None if chances is None else _calibration(table, chances),
    )


def _calibration(answered: Confusion, chances: Scores) -> Calibration:
    """Calibration of the likeliest candidate; Brier's parts of the last of two classes (yes)."""
    likeliest, confidence = chances.argmax(1), chances.max(1)
    right = (likeliest == answered.truth).astype(np.float64)
    binary = len(answered.names) == 2
    parts = brier_decomposition(chances[:, 1], (answered.truth == 1).astype(np.float64)) if binary else None
    return Calibration(
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
    """(questions, classes), the probability of each class; None where one question's are not known."""
    rows = []
    for one in chosen:
        if one.probabilities is None:
            return None
        named = {normalize_answer(text.lower()) or text.lower(): p for text, p in one.probabilities.items()}
        rows.append([named.get(name, 0.0) for name in table.names])
    return np.array(rows)


def _areas(table: Confusion, chances: Scores) -> dict[str, tuple[Measured, Measured]]:
    """By class, AUROC and average precision against the rest, where there are questions of both."""
    areas = {}
    for column, name in enumerate(table.names):
        positive = table.truth == column
        if positive.any() and not positive.all():
            area = auroc(positive, chances[:, column], table.groups)
            precision = average_precision(positive, chances[:, column], table.groups)
            areas[name] = _measured(area), _measured(precision)
    return areas


def _macro(areas: Mapping[str, tuple[Measured, Measured]]) -> dict[str, Measured]:
    """Of two classes the last one's (yes); of more the means over classes, which have no interval."""
    if not areas:
        return {}
    names = ("AUROC", "average precision")
    if len(areas) == 2:
        return dict(zip(names, list(areas.values())[-1], strict=True))
    means = [float(np.mean([area[kind].value for area in areas.values()])) for kind in (0, 1)]
    return {f"macro {name}": Measured(value=mean, interval=None) for name, mean in zip(names, means, strict=True)}


def _guessing(chosen: Sequence[AskedAnswer], groups: Groups, training: Frequencies | None) -> Guessing:
    questions = [one.question for one in chosen]
    right = _right(chosen, [one.answer for one in chosen])
    hindsight = _right(chosen, hindsight_guesses(questions, [one.truths[0] for one in chosen]))
    majority, unseen = None, None
    if training is not None:
        guesses = majority_guesses(questions, training)
        if guesses.unseen < len(questions):
            majority, unseen = _right(chosen, [guess or "" for guess in guesses.answers]), guesses.unseen
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


def _right(chosen: Sequence[AskedAnswer], answers: Sequence[str]) -> Scores:
    """Which answers give an accepted truth, (questions,)."""
    right = [any(gives(answer, truth) for truth in one.truths) for one, answer in zip(chosen, answers, strict=True)]
    return np.array(right, dtype=np.float64)


def _subgroups(chosen: Sequence[AskedAnswer], groups: Groups) -> dict[str, AttributeMeasured]:
    """Closed questions by attribute, in the order in which attributes come; constant ones are left out."""
    right = _right(chosen, [one.answer for one in chosen])
    measured = {}
    for name in dict.fromkeys(name for one in chosen for name in one.attributes):
        labels = banded([one.attributes.get(name) for one in chosen])
        labelled = [index for index, label in enumerate(labels) if label is not None]
        values = [label for label in labels if label is not None]
        if len(set(values)) > 1:
            truths = [normalize_answer(chosen[index].truths[0].lower()) for index in labelled]
            scored = subgroups(right[labelled], groups[labelled], values)
            association = cramers_v(values, truths, groups[labelled])
            measured[name] = AttributeMeasured(
                groups={value: _group(group) for value, group in scored.groups.items()},
                worst=scored.worst,
                gap=None if scored.gap is None else Measured(value=scored.gap, interval=scored.gap_ends),
                association=Measured(value=association.value, interval=association.ends),
                missing=len(chosen) - len(labelled),
            )
    return measured


def _group(group: GroupScore) -> GroupMeasured:
    score = None if group.score is None else Measured(value=group.score, interval=group.ends)
    return GroupMeasured(questions=group.questions, patients=group.patients, score=score, p=group.p)


def _counts(asked: Sequence[AskedAnswer], indices: Sequence[int], groups: Groups) -> CountsMeasured:
    chosen = [asked[index] for index in indices]
    clusters = np.unique(groups[list(indices)], return_inverse=True)[1]
    figures = count_figures([one.answer for one in chosen], [one.truths[0] for one in chosen], clusters)
    return CountsMeasured(
        questions=figures.questions,
        unparsed=figures.unparsed,
        mean_absolute_error=_measured(figures.error) if figures.error else None,
        exact=_measured(figures.exact),
    )


def _measured(figure: Figure) -> Measured:
    return Measured(value=figure.value, interval=figure.ends)
