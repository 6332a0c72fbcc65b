"""Orders of a stream's tasks, drawn always alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import factorial

from mslora_cr.config.schema import ConfigError


def task_orders(tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """So many different orders of the tasks, the one given first.

    Raises:
        ConfigError: there are fewer.
    """
    if not 1 <= count <= factorial(len(tasks)):
        raise ConfigError(
            f"--orders: {len(tasks)} tasks have {factorial(len(tasks))} orders; {count} is not among them"
        )
    orders = [tuple(tasks)]
    generator = random.Random(0)
    while len(orders) < count:
        drawn = tuple(generator.sample(tasks, len(tasks)))
        if drawn not in orders:
            orders.append(drawn)
    return orders
