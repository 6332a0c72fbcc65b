"""Closed questions by attributes of patient and picture: subgroups, and attributes that are shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mslora_cr.clinical.asked import AskedAnswer, right_of
from mslora_cr.clinical.file import AttributeMeasured, GroupMeasured
from mslora_cr.metrics.guessing import hindsight_guesses
from mslora_cr.metrics.measured import Measured
from mslora_cr.metrics.published import normalize_answer
from mslora_cr.statistics.interval import PairedChange
from mslora_cr.statistics.intervals import Groups, Scores
from mslora_cr.statistics.paired import paired_change, paired_task
from mslora_cr.statistics.subgroups import FEWEST_PATIENTS, GroupScore, banded, cramers_v, subgroups


def by_attribute(chosen: Sequence[AskedAnswer], groups: Groups) -> dict[str, AttributeMeasured]:
    """Measure closed questions by attribute, in the order of the attributes; constant attributes are left out."""
    right = right_of(chosen, [one.answer for one in chosen])
    measured = {}
    for name in dict.fromkeys(name for one in chosen for name in one.attributes):
        labels = banded([one.attributes.get(name) for one in chosen])
        labelled = [index for index, label in enumerate(labels) if label is not None]
        values = [label for label in labels if label is not None]
        if len(set(values)) > 1:
            truths = [normalize_answer(chosen[index].truths[0].lower()) for index in labelled]
            scored = subgroups(right[labelled], groups[labelled], values)
            association = cramers_v(values, truths, groups[labelled])
            labelled_records = [chosen[index] for index in labelled]
            alone, shortcut = _alone(labelled_records, values, right[labelled], groups[labelled])
            guesses = {value: float(alone[[label == value for label in values]].mean()) for value in scored.groups}
            measured[name] = AttributeMeasured(
                groups={value: _group(group, guesses[value]) for value, group in scored.groups.items()},
                worst=scored.worst,
                gap=None if scored.gap is None else Measured(value=scored.gap, interval=scored.gap_ends),
                association=Measured(value=association.value, interval=association.ends),
                missing=len(chosen) - len(labelled),
                alone=float(alone.mean()),
                shortcut=shortcut,
            )
    return measured


def changes_by_group(
    attributes: Sequence[Mapping[str, str | int | float]], differences: Scores, groups: Groups
) -> dict[str, dict[str, tuple[float, PairedChange]]]:
    """Return how the score of each group of patients changed between two stages, in points, by attribute and group;
    groups of fewer than `FEWEST_PATIENTS` are left out.

    Args:
        differences: (questions,), later score minus earlier score, of scores that are 0 or 1.
        groups: (questions,), the number of each question's patient or image.
    """
    changes: dict[str, dict[str, tuple[float, PairedChange]]] = {}
    for name in dict.fromkeys(name for one in attributes for name in one):
        labels = np.array([label or "" for label in banded([one.get(name) for one in attributes])], dtype=object)
        for value in sorted({*labels} - {""}):
            clusters = np.unique(groups[labels == value], return_inverse=True)[1]
            if int(clusters.max()) + 1 >= FEWEST_PATIENTS:
                task = paired_task(differences[labels == value], clusters, binary=True)
                changes.setdefault(name, {})[value] = 100 * task.total.mean, paired_change([task])
    return changes


def _alone(chosen: Sequence[AskedAnswer], labels: Sequence[str], right: Scores, groups: Groups) -> tuple[Scores, bool]:
    """Return which questions the best constant answer to each question within a label gets right, (questions,), and
    whether the attribute is a shortcut: those constants beat one constant for all labels, and the model does not beat
    them."""
    questions, truths = [one.question for one in chosen], [one.truths[0] for one in chosen]
    within = [f"{label}: {question}" for label, question in zip(labels, questions, strict=True)]
    by_label, overall = (right_of(chosen, hindsight_guesses(asked, truths)) for asked in (within, questions))
    clusters = np.unique(groups, return_inverse=True)[1]
    gain, lead = (
        paired_change([paired_task(difference, clusters, binary=True)]).ends[0]
        for difference in (by_label - overall, right - by_label)
    )
    return by_label, gain > 0 >= lead


def _group(group: GroupScore, guess: float) -> GroupMeasured:
    score = None if group.score is None else Measured(value=group.score, interval=group.ends)
    return GroupMeasured(questions=group.questions, patients=group.patients, score=score, p=group.p, guess=guess)
