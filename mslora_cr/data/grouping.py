"""Rows that belong together (one patient's, or about one image), and a share of such groups drawn for one side."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence

FEW = 2
"""An answer that the drawn side would hold fewer of than this is not balanced by itself, but with all rare ones."""

LOOKED_AT = 16
"""Groups that are compared before one of them is taken."""


def connected(keys: Sequence[Sequence[str]]) -> list[str]:
    """A name for the group of each row: rows that share a key, directly or through others, are of one group.

    Args:
        keys: of each row, at least one, such as its patient and its images. A group has the name of a key of its own.
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
    """Whole groups for one side, until it has a share of the rows, and of every common answer as nearly as they allow.

    The next group is always one that has the answer of which most is lacking, relative to what is wanted (iterative
    stratification: Sechidis et al., ECML PKDD 2011). Among these the seed decides. One group stays on the other side.

    Args:
        groups: the name of each row's group.
        answers: of each row, what is to be balanced.
        share: of the rows, in (0, 1).
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
    needs = [(-1.0, index) for index in range(len(names))]  # a heap: equal needs in the order that the seed drew
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
    """By how much a group takes its answers beyond their shares, relative to these."""
    return sum(max((taken[answer] + count) / wanted[answer] - 1, 0) for answer, count in more.items())
