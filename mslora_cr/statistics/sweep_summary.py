"""Figures of several runs of one stream, over orders of the tasks and seeds: means, spread, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from mslora_cr.statistics.intervals import NONE, Estimate, mean_interval, t_interval
from mslora_cr.statistics.significance import flip_test, holm, t_test

OURS = "mslora_cr"
"""The method with which every other one is compared."""
Runs = Mapping[tuple[int, int], float]
"""A figure by order and seed."""


def summarize(outcomes: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, Any]]:
    """Return by method and figure the mean over all runs, their standard deviation, and the effect of the order.

    `between_orders` is the standard deviation of the orders' means (each over its seeds), `within_orders` the pooled
    one of the runs about their order's mean. An order matters if the first clearly exceeds the second divided by the
    root of the number of seeds. `against` is the paired difference to MSLoRA-CR at the same order and seed
    (`_against`); its p-values are corrected by Holm's method over the methods of a figure.

    Args:
        metric: A name in their `figures`.
    """
    spreads: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, Runs]] = {}
    for method in dict.fromkeys(outcome["method"] for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome["method"] == method and metric in outcome["figures"]]
        figures = [name for name in rows[0]["figures"][metric] if name != "final"] if rows else []
        for figure in figures:
            by_run = {(row["order"], row["seed"]): row["figures"][metric][figure] for row in rows}
            defined: Runs = {key: value for key, value in by_run.items() if value is not None}
            if defined:
                values.setdefault(method, {})[figure] = defined
    for method, figures_of in values.items():
        spreads[method] = {}
        for figure, defined in figures_of.items():
            paired = _paired(defined, values.get(OURS, {}).get(figure, {}))
            spreads[method][figure] = {**_spread(defined), "against": _against(paired) if paired else None}
    for figure in {figure for figures_of in spreads.values() for figure in figures_of}:
        tests = [by_run[figure]["against"] for method, by_run in spreads.items() if method != OURS and figure in by_run]
        family = [test for test in tests if test is not None and test["p"] is not None]
        for test, adjusted in zip(family, holm([test["p"] for test in family]), strict=True):
            test["p_adjusted"] = adjusted
    return spreads


def _paired(values: Runs, ours: Runs) -> Runs:
    return {key: value - ours[key] for key, value in values.items() if key in ours}


def _by_order(values: Runs) -> dict[int, list[float]]:
    orders: dict[int, list[float]] = {}
    for (order, _), value in sorted(values.items()):
        orders.setdefault(order, []).append(value)
    return orders


def _within(orders: Mapping[int, Sequence[float]]) -> tuple[float, int]:
    """Return the sum of squares of the runs about their order's mean, and its degrees of freedom."""
    squares = sum(float(np.var(group)) * len(group) for group in orders.values())
    return squares, sum(len(group) - 1 for group in orders.values())


def _spread(values: Runs) -> dict[str, Any]:
    orders = _by_order(values)
    means = {order: fmean(group) for order, group in orders.items()}
    squares, freedom = _within(orders)
    return {
        "runs": len(values),
        "mean": fmean(values.values()),
        "deviation": _deviation(list(values.values())),
        "by_order": {str(order): mean for order, mean in means.items()},
        "between_orders": _deviation(list(means.values())),
        "within_orders": (squares / freedom) ** 0.5 if freedom else None,
    }


def _against(paired: Runs) -> dict[str, Any]:
    """Return paired differences of runs: mean, deviation, intervals and p-values.

    `interval` and `p` are Student's t for other seeds of these orders: the variance is that about the orders' means, or
    about the mean of all if every order has one run. `orders_interval` treats the orders as a sample of orders:
    Student's t of their means, or None for one order. `p_flips` is the exact sign-flip test of the runs.
    """
    differences, orders = list(paired.values()), _by_order(paired)
    squares, freedom = _within(orders)
    if not freedom:
        squares, freedom = float(np.var(differences)) * len(differences), len(differences) - 1
    count = len(differences)
    variance = squares / freedom / count if freedom else 0.0
    square = float(np.square(differences).mean())
    total = Estimate(fmean(differences), square, variance, freedom, len(orders), count, count, 1 / count)
    spread = variance > NONE
    return {
        "mean": total.mean,
        "deviation": _deviation(differences),
        "pairs": count,
        "interval": mean_interval(total) if spread else None,
        "orders_interval": t_interval([fmean(group) for group in orders.values()]),
        "p": t_test(total) if spread else None,
        "p_flips": flip_test(differences),
        "p_adjusted": None,
    }


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
