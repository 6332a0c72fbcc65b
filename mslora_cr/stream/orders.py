"""Draws orders of a stream's tasks, the same ones every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import factorial

from mslora_cr.config.schema import ConfigError


def task_orders(tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """As many different orders of the tasks, the given one first.

    Raises:
        ConfigError: There are fewer.
    """
    if not 1 <= count <= factorial(len(tasks)):
        raise ConfigError(f"--orders: {len(tasks)} tasks have {factorial(len(tasks))} orders, fewer than {count}")
    orders = [tuple(tasks)]
    generator = random.Random(0)
    while len(orders) < count:
        drawn = tuple(generator.sample(tasks, len(tasks)))
        if drawn not in orders:
            orders.append(drawn)
    return orders
