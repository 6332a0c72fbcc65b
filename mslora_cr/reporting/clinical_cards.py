"""What the report says of closed questions to a clinical reader: a card for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mslora_cr.clinical.file import CLINICAL, AttributeMeasured, Clinical, ClosedMeasured, Measured
from mslora_cr.evaluation.results import Evaluation
from mslora_cr.statistics.interval import bracketed
from mslora_cr.statistics.sample_size import design_effect, detectable_difference, share_half_width

CHANGED = 0.08
"""The share of changed answers for which the smallest difference that would be found is told."""


class ClinicalCard(NamedTuple):
    """A task's closed questions after its last evaluated stage.

    Attributes:
        task: its name.
        stage: the stage.
        guessing: what guessing gives, and whether the score is above it.
        marked: whether it is not.
        figures: by name, value and interval as text.
        classes: rows of class, questions, said, recall and precision.
        texts: rows of question, questions, balanced accuracy and what guessing makes of it.
        attributes: by name, a line and rows of group, questions, patients, score and p.
        enough: what so many questions can show.
    """

    task: str
    stage: int
    guessing: str
    marked: bool
    figures: Mapping[str, str]
    classes: list[list[str]]
    texts: list[list[str]]
    attributes: Mapping[str, tuple[str, list[list[str]]]]
    enough: str


def clinical_cards(evaluation: Evaluation, results_dir: Path) -> list[ClinicalCard]:
    """The cards of the tasks that have closed questions, as far as their files are there."""
    cards = []
    for task in evaluation.tasks:
        cell = evaluation.last_cell(task) or evaluation.own_cell(task)
        clinical = Clinical.read_if_there((results_dir / cell.answers).with_name(CLINICAL)) if cell else None
        if cell is not None and clinical is not None and clinical.closed is not None:
            cards.append(_card(task, cell.stage, clinical, clinical.closed))
    return cards


def _card(task: str, stage: int, clinical: Clinical, closed: ClosedMeasured) -> ClinicalCard:
    guessing = closed.guessing
    constants = {"the most frequent training answer": guessing.majority, "the best constant answer": guessing.hindsight}
    given = ", ".join(f"{name} {100 * share:.1f} %" for name, share in constants.items() if share is not None)
    verdict = guessing.in_words() or f"above guessing by {guessing.gain:.1f} points{bracketed(guessing.interval)}"
    return ClinicalCard(
        task=task,
        stage=stage,
        guessing=f"{verdict} ({given})",
        marked=not guessing.above,
        figures={name: figure_text(figure) for name, figure in closed.figures.items()},
        classes=[
            [one.name, str(one.questions), str(one.said), figure_text(one.recall), figure_text(one.precision)]
            for one in closed.by_class
        ],
        texts=[
            [
                one.question or "",
                str(one.questions),
                figure_text(one.figures["balanced accuracy"]),
                one.guessing.in_words(),
            ]
            for one in clinical.by_question
        ],
        attributes={name: (_gap(attribute), _groups(attribute)) for name, attribute in clinical.subgroups.items()},
        enough=_enough(closed),
    )


def figure_text(figure: Measured | None) -> str:
    """A share in percent with its interval; a dash where there is none."""
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
    return f"largest gap {figure_text(attribute.gap)} points, worst: {attribute.worst}; {association}{missing}"


def _groups(attribute: AttributeMeasured) -> list[list[str]]:
    return [
        [
            value,
            str(group.questions),
            str(group.patients),
            figure_text(group.score) if group.score else "counted only",
            "–" if group.p is None else f"{group.p:.3f}",
        ]
        for value, group in attribute.groups.items()
    ]


def _enough(closed: ClosedMeasured) -> str:
    effect = design_effect(closed.questions, closed.groups)
    fewest = min(one.questions for one in closed.by_class)
    width = f"±{100 * share_half_width(0.9, fewest, effect):.1f} points for a recall of 90 %" if fewest else "nothing"
    least = 100 * detectable_difference(closed.questions, CHANGED, effect)
    return (
        f"{closed.questions} questions of {closed.groups} images or patients, design effect {effect:.1f}: the rarest "
        f"class, {fewest} questions, shows {width}; with {100 * CHANGED:.0f} % of answers changed a difference of "
        f"{least:.1f} points would be found with 80 % power"
    )
