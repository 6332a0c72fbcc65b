"""How strongly an attribute, such as the view or the site, is associated with the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mslora_cr.statistics.interval import Interval
from mslora_cr.statistics.intervals import SAMPLES, SEED, Groups


class Association(NamedTuple):
    """Cramér's V with its interval; None for fewer than two clusters."""

    value: float
    ends: Interval | None


def cramers_v(first: Sequence[str], second: Sequence[str], groups: Groups) -> Association:
    """Bias-corrected Cramér's V between two labellings, in [0, 1], with a percentile bootstrap over clusters.

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
