"""Orders of a stream's tasks: drawn, the same ones every time, or a Latin square."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import factorial

from mslora_cr.config.schema import ConfigError


def task_orders(tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Return `count` different orders of the tasks, the given one first.

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


def latin_orders(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Return orders in which every task stands equally often at every place, and directly behind every other task; the
    one given is the first. An even number of tasks has as many orders, an odd number twice as many.

    Source: Williams, "Experimental Designs Balanced for the Estimation of Residual Effects of Treatments", Australian
    Journal of Scientific Research A 2, 1949.
    """
    count = len(tasks)
    zigzag = [-(-index // 2) if index % 2 else (count - index // 2) % count for index in range(count)]
    names = dict(zip(zigzag, tasks, strict=True))
    rows = [tuple(names[(number + shift) % count] for number in zigzag) for shift in range(count)]
    return rows if count % 2 == 0 or count == 1 else [*rows, *(row[::-1] for row in rows)]
