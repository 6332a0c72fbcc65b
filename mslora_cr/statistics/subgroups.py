"""Scores by group of patients: the worst group, the largest gap, and whether chance could explain it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mslora_cr.statistics.interval import Interval
from mslora_cr.statistics.intervals import SAMPLES, SEED, Groups, Scores, estimate, resampled_sums, score_interval
from mslora_cr.statistics.significance import holm

FEWEST_PATIENTS = 10
"""Groups of fewer patients (or images, if no patient is known) are counted, but not scored."""
BANDS = 4
"""The number of bands of a number, such as an age; each has as many patients."""
MOST_VALUES = 8
"""Numbers with more different values than this are cut into bands."""


class GroupScore(NamedTuple):
    """A group of patients.

    Attributes:
        questions: The number of questions about them.
        score: The mean over questions; None for too few patients.
        ends: The ends of its interval.
        p: The p-value that the group scores like all others, by permutation, adjusted by Holm's method; None if labels
            differ within a patient.
    """

    questions: int
    patients: int
    score: float | None
    ends: Interval | None
    p: float | None


class Subgroups(NamedTuple):
    """Scores by the values of an attribute.

    Attributes:
        groups: By value.
        worst: The scored group with the lowest score; None if fewer than two are scored.
        gap: The highest score minus the lowest.
        gap_ends: By resampling of patients; even groups that do not differ have a gap above 0.
    """

    groups: dict[str, GroupScore]
    worst: str | None
    gap: float | None
    gap_ends: Interval | None


def banded(values: Sequence[str | int | float | None]) -> list[str | None]:
    """Return values as names of groups; numbers of more than `MOST_VALUES` kinds as bands of equally many patients."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(set(numbers)) <= MOST_VALUES or len(numbers) < sum(value is not None for value in values):
        return [None if value is None else str(value) for value in values]
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, BANDS + 1)[1:-1]))
    names = [f"up to {edges[0]:g}", *(f"above {edge:g}" for edge in edges)]
    names[1:-1] = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [None if value is None else names[int(np.searchsorted(edges, float(value)))] for value in values]


def subgroups(scores: Scores, patients: Groups, labels: Sequence[str]) -> Subgroups:
    """Return scores by label.

    Args:
        scores: (questions,), in [0, 1].
        patients: (questions,), the number of each question's patient or image.
        labels: (questions,), each question's group.
    """
    names, subgroup = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    clusters = np.unique(patients, return_inverse=True)[1]
    counts = [len(np.unique(clusters[subgroup == number])) for number in range(len(names))]
    scored = [number for number, count in enumerate(counts) if count >= FEWEST_PATIENTS]
    p = _permuted(scores, clusters, subgroup, scored)
    groups = {}
    for number, name in enumerate(names):
        where = subgroup == number
        estimated = estimate(scores[where], patients[where]) if number in scored else None
        groups[str(name)] = GroupScore(
            questions=int(where.sum()),
            patients=counts[number],
            score=estimated.mean if estimated else None,
            ends=score_interval([estimated]) if estimated else None,
            p=p.get(number),
        )
    if len(scored) < 2:
        return Subgroups(groups, None, None, None)
    means = {number: float(scores[subgroup == number].mean()) for number in scored}
    worst = min(means, key=lambda number: means[number])
    gap = max(means.values()) - means[worst]
    return Subgroups(groups, str(names[worst]), gap, _gap_interval(scores, clusters, subgroup, scored))


def _gap_interval(scores: Scores, clusters: Groups, subgroup: Groups, scored: Sequence[int]) -> Interval:
    columns = [
        values
        for number in scored
        for values in (scores * (subgroup == number), (subgroup == number).astype(np.float64))
    ]
    sums = resampled_sums(np.column_stack(columns), clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums[:, ::2] / sums[:, 1::2]
    gaps = np.nanmax(means, axis=1) - np.nanmin(means, axis=1)
    low, high = np.percentile(gaps, [2.5, 97.5])
    return float(low), float(high)


def _permuted(scores: Scores, clusters: Groups, subgroup: Groups, scored: Sequence[int]) -> dict[int, float]:
    """Return the p-value of each group's distance from all others under permuted labels of patients, adjusted for the
    number of groups; empty if labels differ within a patient, or fewer than two groups are scored."""
    count = int(clusters.max()) + 1
    label = np.zeros(count, dtype=np.int64)
    label[clusters] = subgroup
    if (label[clusters] != subgroup).any() or len(scored) < 2:
        return {}
    sums, sizes = np.bincount(clusters, scores, count), np.bincount(clusters, minlength=count)

    def distances(labels: Groups) -> Scores:
        inside = [(sums[labels == number].sum(), sizes[labels == number].sum()) for number in scored]
        total, asked = sums.sum(), sizes.sum()
        return np.array([abs(hit / n - (total - hit) / max(asked - n, 1)) for hit, n in inside])

    seen = distances(label)
    generator = np.random.default_rng(SEED)
    beyond = sum((distances(generator.permutation(label)) >= seen - 1e-12).astype(int) for _ in range(SAMPLES))
    raw = [(1 + int(more)) / (1 + SAMPLES) for more in np.atleast_1d(beyond)]
    return dict(zip(scored, holm(raw), strict=True))


class Association(NamedTuple):
    """Cramér's V with its interval; None for fewer than two clusters."""

    value: float
    ends: Interval | None


def cramers_v(first: Sequence[str], second: Sequence[str], groups: Groups) -> Association:
    """Return bias-corrected Cramér's V between two labellings, in [0, 1], with a percentile bootstrap over clusters.

    ``φ² = χ²/n - (k-1)(r-1)/(n-1)``, cut off at 0, divided by the smaller of the corrected numbers of rows and columns
    minus one. Source: Bergsma, "A Bias-Correction for Cramér's V and Tschuprow's T", Journal of the Korean Statistical
    Society 2013.

    Args:
        first: (questions,), the first label of each.
        second: (questions,), the second label of each.
        groups: (questions,), images or patients.
    """
    rows = np.unique(np.asarray(first, dtype=object).astype(str), return_inverse=True)[1]
    columns = np.unique(np.asarray(second, dtype=object).astype(str), return_inverse=True)[1]
    clusters = np.unique(groups, return_inverse=True)[1]
    shape, count = (int(rows.max()) + 1, int(columns.max()) + 1), int(clusters.max()) + 1
    value = _corrected(_table(rows, columns, np.ones(len(rows)), shape))
    if count < 2:
        return Association(value, None)
    generator = np.random.default_rng(SEED)
    replicates = []
    for _ in range(SAMPLES):
        weights = np.bincount(generator.integers(count, size=count), minlength=count)[clusters]
        replicates.append(_corrected(_table(rows, columns, weights.astype(np.float64), shape)))
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Association(value, (float(low), float(high)))


def _table(rows: Groups, columns: Groups, weights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    flat = np.bincount(rows * shape[1] + columns, weights, shape[0] * shape[1])
    return flat.reshape(shape)


def _corrected(table: np.ndarray) -> float:
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    total, (rows, columns) = table.sum(), table.shape
    if min(rows, columns) < 2 or total < 2:
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / total
    squared = (np.square(table - expected) / expected).sum() / total
    corrected = max(0.0, squared - (columns - 1) * (rows - 1) / (total - 1))
    fewest = min(rows - (rows - 1) ** 2 / (total - 1), columns - (columns - 1) ** 2 / (total - 1)) - 1
    return float(min(1.0, (corrected / fewest) ** 0.5)) if fewest > 0 else 0.0
