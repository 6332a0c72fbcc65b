"""Groups rows that belong together (one patient's, or about one image), and draws a share of such groups for one
side."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence

FEW = 2
"""An answer with fewer rows than this on the drawn side is balanced together with all rare ones, not by itself."""

LOOKED_AT = 16
"""The number of groups that are compared before one of them is taken."""


def connected(keys: Sequence[Sequence[str]]) -> list[str]:
    """Name the group of each row: rows that share a key, directly or through others, are in one group.

    Args:
        keys: Each row's keys, at least one, such as its patient and its images. A group is named after one of its keys.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    for first, *others in keys:
        for other in others:
            parents[root(other)] = root(first)
    return [root(row[0]) for row in keys]


def drawn_groups(groups: Sequence[str], answers: Sequence[Hashable], share: float, seed: int) -> set[str]:
    """Draw whole groups for one side until it has its share of the rows, and as nearly as possible of every common
    answer.

    The next group always has the answer that is lacking most, relative to what is wanted (iterative stratification:
    Sechidis et al., ECML PKDD 2011). Among these the seed decides. One group stays on the other side.

    Args:
        groups: The name of each row's group.
        answers: For each row, the value to balance.
        share: The share of the rows, in (0, 1).
        seed: Draws the groups.
    """
    counts = Counter(answers)
    held: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for group, answer in zip(groups, answers, strict=True):
        held[group][answer if counts[answer] * share >= FEW else None] += 1
    order = sorted(held)
    random.Random(seed).shuffle(order)
    waiting: dict[Hashable, deque[str]] = defaultdict(deque)
    wanted: dict[Hashable, float] = defaultdict(float)
    for group in order[1:]:
        for answer in held[group]:
            waiting[answer].append(group)
    for group in order:
        for answer, count in held[group].items():
            wanted[answer] += share * count
    return _drawn(held, waiting, wanted, share * len(groups))


def _drawn(
    held: Mapping[str, Counter[Hashable]],
    waiting: Mapping[Hashable, deque[str]],
    wanted: Mapping[Hashable, float],
    rows: float,
) -> set[str]:
    taken: Counter[Hashable] = Counter()
    drawn: set[str] = set()
    names = list(waiting)
    needs = [(-1.0, index) for index in range(len(names))]  # The heap orders equal needs as the seed drew them.
    while taken.total() < rows and needs:
        need, index = heapq.heappop(needs)
        answer = names[index]
        if need < (now := taken[answer] / wanted[answer] - 1):
            heapq.heappush(needs, (now, index))
        elif waiting[answer]:
            queue = waiting[answer]
            candidates = [queue.popleft() for _ in range(min(LOOKED_AT, len(queue)))]
            candidates = [group for group in candidates if group not in drawn]
            if candidates:
                best = min(candidates, key=lambda group: _excess(held[group], taken, wanted))
                queue.extendleft(group for group in reversed(candidates) if group != best)
                drawn.add(best)
                taken += held[best]
            heapq.heappush(needs, (taken[answer] / wanted[answer] - 1, index))
    return drawn


def _excess(more: Counter[Hashable], taken: Mapping[Hashable, int], wanted: Mapping[Hashable, float]) -> float:
    """Return by how much a group would exceed the shares of its answers, relative to these."""
    return sum(max((taken[answer] + count) / wanted[answer] - 1, 0) for answer, count in more.items())
