"""What the report tells a clinical reader about closed questions: a card for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from mslora_cr.clinical.file import CLINICAL, AttributeMeasured, Calibration, Clinical, ClosedMeasured
from mslora_cr.clinical.groups import changes_by_group
from mslora_cr.data.records import TestRecord
from mslora_cr.evaluation.results import Cell, Evaluation
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.metrics.by_class import AUROC, SENSITIVITY
from mslora_cr.metrics.measured import Measured
from mslora_cr.metrics.typed import CHOICE
from mslora_cr.reporting.plots import curve_plots, subgroup_dots
from mslora_cr.statistics.interval import bracketed
from mslora_cr.statistics.sample_size import shown_by

Changes = Mapping[str, Mapping[str, str]]
"""A change in points with its interval, by attribute and group."""


MOST_CLASSES = 12


class ClinicalCard(NamedTuple):
    """A task's closed questions, counts and sets of labels after its last evaluated stage; what it does not ask is
    empty.

    Attributes:
        guessing: What guessing gives, and whether the score is above it.
        marked: Whether the score is not above guessing.
        figures: Value and interval as text, by name.
        lines: What is known of probabilities, options, counts and sets of labels, a sentence each.
        labels: Rows of label, questions, said, sensitivity and specificity.
        confusion: The true class by the one that was said: a row of titles and a row for each class.
        classes: Rows of class, questions, said, recall and precision; the last one counts answers of no class.
        texts: Rows of question, questions, balanced accuracy and what guessing scores on it.
        attributes: By name, a line and rows of group, questions, patients, score, best constant answer, p, and change
            since the task was learned.
        enough: What this many questions can show.
        curves: ROC, reliability and risk over coverage as SVG; None without probabilities.
        dots: Scores by subgroup as SVG; None without scored groups.
    """

    task: str
    stage: int
    guessing: str
    marked: bool
    figures: Mapping[str, str]
    lines: list[str]
    labels: list[list[str]]
    confusion: list[list[str]]
    classes: list[list[str]]
    texts: list[list[str]]
    attributes: Mapping[str, tuple[str, list[list[str]]]]
    enough: str
    curves: Markup | None
    dots: Markup | None


def clinical_cards(
    evaluation: Evaluation, results_dir: Path, asked: Mapping[str, Sequence[TestRecord]] | None = None
) -> list[ClinicalCard]:
    """Return the cards of the tasks that have such questions, as far as their files exist.

    Args:
        asked: The questions of each task, where known: they tell how each group's scores changed over the stages.
    """
    cards = []
    for task in evaluation.tasks:
        cell = evaluation.last_cell(task) or evaluation.own_cell(task)
        clinical = Clinical.read_if_there((results_dir / cell.answers).with_name(CLINICAL)) if cell else None
        if cell is not None and clinical is not None and (clinical.closed or clinical.counts or clinical.label_sets):
            learned, records = evaluation.own_cell(task), (asked or {}).get(task)
            later = learned is not None and learned.answers != cell.answers
            changes = _changes(learned, cell, results_dir, records) if learned and later and records else {}
            cards.append(_card(task, cell.stage, clinical, clinical.closed, changes))
    return cards


def _changes(learned: Cell, last: Cell, results_dir: Path, records: Sequence[TestRecord]) -> Changes:
    """Return the change of exact choice since a task was learned, by attribute and group."""
    before, after = (read_scores((results_dir / cell.answers).with_name(SCORES)) for cell in (learned, last))
    columns = [table.columns[CHOICE] for table in (before, after) if CHOICE in table.columns]
    if [len(column) for column in columns] != [len(records)] * 2:
        return {}
    difference = columns[1] - columns[0]
    scored = ~np.isnan(difference)
    attributes = [record.attributes for record, is_scored in zip(records, scored, strict=True) if is_scored]
    by_group = changes_by_group(attributes, difference[scored], after.groups[scored])
    return {
        name: {value: f"{points:+.1f}{bracketed(change.ends)}" for value, (points, change) in groups.items()}
        for name, groups in by_group.items()
    }


def _card(
    task: str, stage: int, clinical: Clinical, closed: ClosedMeasured | None, changes: Changes | None = None
) -> ClinicalCard:
    return ClinicalCard(
        task=task,
        stage=stage,
        guessing=_guessing(closed) if closed else "",
        marked=closed is not None and not closed.guessing.above,
        figures={_named(name, closed): figure_text(figure) for name, figure in closed.figures.items()}
        if closed
        else {},
        lines=_lines(clinical, closed),
        labels=[
            [one.name, str(one.questions), str(one.said), figure_text(one.sensitivity), figure_text(one.specificity)]
            for one in (clinical.label_sets.by_label if clinical.label_sets else ())
        ],
        confusion=_confusion(closed) if closed else [],
        classes=_classes(closed) if closed else [],
        texts=[
            [
                one.question or "",
                str(one.questions),
                figure_text(one.figures["balanced accuracy"]),
                one.guessing.in_words(),
            ]
            for one in clinical.by_question
        ],
        attributes={
            name: (_gap(attribute), _groups(attribute, (changes or {}).get(name, {})))
            for name, attribute in clinical.subgroups.items()
        },
        enough=shown_by(closed.questions, closed.groups, min(one.questions for one in closed.by_class))
        if closed
        else "",
        curves=Markup(curve_plots(closed.curves)) if closed and closed.curves else None,
        dots=Markup(dots) if (dots := subgroup_dots(clinical.subgroups)) else None,
    )


def _guessing(closed: ClosedMeasured) -> str:
    guessing = closed.guessing
    constants = {"the most frequent training answer": guessing.majority, "the best constant answer": guessing.hindsight}
    given = ", ".join(f"{name} {100 * share:.1f} %" for name, share in constants.items() if share is not None)
    verdict = guessing.in_words() or f"above guessing by {guessing.gain:.1f} points{bracketed(guessing.interval)}"
    return f"{verdict} ({given})"


def _lines(clinical: Clinical, closed: ClosedMeasured | None) -> list[str]:
    lines = [_calibration(closed.calibration)] if closed and closed.calibration else []
    if closed and (choices := closed.choices):
        lines.append(
            f"Options: {choices.parsed} answers chose one, {choices.unparsed} none, {choices.ambiguous} several"
        )
    if counts := clinical.counts:
        error, near = counts.mean_absolute_error, counts.near
        lines.append(
            f"Counts, {counts.questions} questions: "
            + (f"mean absolute error {error.value:.2f}{bracketed(error.interval)}, " if error else "")
            + f"exact {figure_text(counts.exact)} %, "
            + (f"off by at most one {figure_text(near)} %, " if near else "")
            + f"{counts.unparsed} answers without a number"
        )
    if sets := clinical.label_sets:
        lines.append(
            f"Sets of labels, {sets.questions}: F1 {figure_text(sets.f1)} %, exact {figure_text(sets.exact)} %"
        )
    return lines


def _calibration(fit: Calibration) -> str:
    fitted = "no temperature is fitted, since no validation questions were answered"
    if fit.temperature is not None and fit.scaled_error is not None:
        fitted = f"{100 * fit.scaled_error:.1f} % at the temperature {fit.temperature:.2f} of validation questions"
    parts = [f"Calibration error {100 * fit.expected_error:.1f} % ({fitted})"]
    if fit.brier is not None:
        split = f"{fit.reliability:.3f} - {fit.resolution:.3f} + {fit.uncertainty:.3f}"
        parts.append(f"Brier score {fit.brier:.3f} (reliability - resolution + uncertainty: {split})")
    right = f"{100 * fit.accuracy_at_80:.1f} and {100 * fit.accuracy_at_90:.1f} % right of the surest 80 and 90 %"
    return "; ".join([*parts, right, f"area under risk over coverage {fit.risk_coverage_area:.3f}"])


def _confusion(closed: ClosedMeasured) -> list[list[str]]:
    """Return the confusion of at most `MOST_CLASSES` classes; empty for more, which the browser of answers shows."""
    if len(closed.classes) > MOST_CLASSES:
        return []
    titles = ["True answer, then said", *closed.classes, "none of these"]
    return [titles, *([name, *map(str, row)] for name, row in zip(closed.classes, closed.confusion, strict=True))]


def _named(name: str, closed: ClosedMeasured) -> str:
    """Return a figure's name, with the positive class where it is not plain."""
    return f"{name} of {closed.classes[-1]}" if name in (SENSITIVITY, AUROC) else name


def _classes(closed: ClosedMeasured) -> list[list[str]]:
    rows = [
        [one.name, str(one.questions), str(one.said), figure_text(one.recall), figure_text(one.precision)]
        for one in closed.by_class
    ]
    none = closed.questions - sum(one.said for one in closed.by_class)
    return [*rows, ["none of these: wrong", "–", str(none), "–", "–"]] if none else rows


def figure_text(figure: Measured | None) -> str:
    """Return a share in percent with its interval; a dash where there is none."""
    if figure is None:
        return "–"
    ends = None if figure.interval is None else (100 * figure.interval[0], 100 * figure.interval[1])
    return f"{100 * figure.value:.1f}{bracketed(ends)}"


def _gap(attribute: AttributeMeasured) -> str:
    missing = f"; {attribute.missing} questions do not have it" if attribute.missing else ""
    association = f"Cramér's V with the true answer {attribute.association.value:.2f}"
    ends = attribute.association.interval
    association += f" [{ends[0]:.2f} to {ends[1]:.2f}]" if ends else ""
    if attribute.gap is None:
        return f"too few patients to compare groups; {association}{missing}"
    line = f"largest gap {figure_text(attribute.gap)} points, worst: {attribute.worst}; {association}{missing}"
    return f"{line}. {warning}" if (warning := attribute.in_words()) else line


def _groups(attribute: AttributeMeasured, changes: Mapping[str, str]) -> list[list[str]]:
    return [
        [
            value,
            str(group.questions),
            str(group.patients),
            figure_text(group.score) if group.score else "counted only",
            "–" if group.guess is None else f"{100 * group.guess:.1f}",
            "–" if group.p is None else f"{group.p:.3f}",
            changes.get(value, "–"),
        ]
        for value, group in attribute.groups.items()
    ]
