"""Groups questions that share an opening, and batches the groups.

In the prompt template images come before the question. Questions about the same images that the same banks answer share
everything up to the last image, so its keys and values are computed once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

from mslora_cr.data.collator import in_batches
from mslora_cr.data.input_processor import Prompt

QUERIES = 4096
"""The most positions of questions that are computed at once after shared openings: attention holds a score for each of
them, each head and each position that it sees."""


@dataclass(frozen=True)
class Limits:
    """Limits of what is answered at once."""

    questions: int
    new_tokens: int
    positions: int
    """The most positions whose keys and values are held at once."""


@dataclass(frozen=True)
class Group:
    """Questions with one opening. With `whole`, the opening is the only question's whole prompt."""

    questions: tuple[int, ...]
    opening: int
    """The number of the opening's positions."""
    rest: int
    """The number of positions after it, for the longest question."""
    whole: bool

    def cost(self, new_tokens: int) -> int:
        """Return the approximate number of positions to compute for the group."""
        return self.opening + len(self.questions) * (self.rest + new_tokens)


@dataclass(frozen=True)
class Wave:
    """Openings that are computed and held together, and the batches of questions that are answered from them. Where
    openings are whole prompts, there is one batch."""

    groups: tuple[Group, ...]
    batches: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> bool:
        return self.groups[0].whole

    @property
    def openings(self) -> dict[int, int]:
        """The index of each question's opening in `groups`."""
        return {question: index for index, group in enumerate(self.groups) for question in group.questions}


def grouped(
    prompts: Sequence[Prompt], asked: Sequence[int], banks: Callable[[int], Hashable], most: int | None = None
) -> list[Group]:
    """Group questions by images, opening and banks.

    Args:
        banks: Identifies the banks of a question.
        most: Split larger groups, so that ranks can share them.
    """
    by_opening: dict[Hashable, list[int]] = {}
    for index in asked:
        prompt = prompts[index]
        alone = not (prompt.opening and prompt.rest)
        by_opening.setdefault(index if alone else (prompt.images, prompt.opening, banks(index)), []).append(index)
    groups = []
    for questions in by_opening.values():
        for part in in_batches(sorted(questions, key=lambda index: -len(prompts[index].rest)), most or len(questions)):
            first = prompts[part[0]]
            whole = len(part) == 1
            groups.append(
                Group(tuple(part), len(first) if whole else len(first.opening), 0 if whole else len(first.rest), whole)
            )
    return groups


def shared_out(groups: Sequence[Group], ranks: int, new_tokens: int) -> list[list[Group]]:
    """Distribute groups over ranks so that all have about the same work: the most expensive first, each to the rank
    with the least."""
    shares: list[list[Group]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for group in sorted(groups, key=lambda group: -group.cost(new_tokens)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(group)
        heapq.heappush(loads, (load + group.cost(new_tokens), rank))
    return shares


def _the_same(question: int) -> Hashable:
    """Return what a wave's questions share, if any questions can be computed together."""
    return None


def in_waves(
    groups: Collection[Group],
    prompts: Sequence[Prompt],
    limits: Limits,
    apart: Callable[[int], Hashable] = _the_same,
) -> list[Wave]:
    """Return waves in the order of computation: those that need the most memory first, so that a lack of memory shows
    at once. Neighbours are of similar length, which keeps padding small.

    Args:
        groups: Groups of questions.
        prompts: The prompts of all questions.
        limits: Limits of a wave.
        apart: Questions for which it differs are in different waves.
    """
    kinds: dict[tuple[bool, Hashable], list[Group]] = {}
    for group in groups:
        kinds.setdefault((group.whole, apart(group.questions[0])), []).append(group)
    waves = []
    for _, of_kind in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        current: list[Group] = []
        for group in sorted(of_kind, key=lambda group: (-group.opening, -group.rest)):
            if current and not _fits([*current, group], limits):
                waves.append(_wave(current, prompts, limits))
                current = []
            current.append(group)
        if current:
            waves.append(_wave(current, prompts, limits))
    return sorted(waves, key=lambda wave: -_held(wave.groups, limits))


def _fits(groups: Sequence[Group], limits: Limits) -> bool:
    return len(groups) <= limits.questions and _held(groups, limits) <= limits.positions


def _held(groups: Sequence[Group], limits: Limits) -> int:
    """Return the number of positions whose keys and values are held at once: those of openings, and of a batch's
    questions and answers.
    """
    questions = min(limits.questions, sum(len(group.questions) for group in groups))
    openings = len(groups) * max(group.opening for group in groups)
    return openings + questions * (max(group.rest for group in groups) + limits.new_tokens)


def _wave(groups: Sequence[Group], prompts: Sequence[Prompt], limits: Limits) -> Wave:
    order = [question for group in groups for question in group.questions]
    if groups[0].whole:
        return Wave(tuple(groups), (tuple(order),))
    longest = max(1, *(group.rest for group in groups))
    batches = in_batches(order, max(1, min(limits.questions, QUERIES // longest)))
    return Wave(tuple(groups), tuple(map(tuple, batches)))


def padding_of(waves: Sequence[Wave], prompts: Sequence[Prompt]) -> float:
    """Return the share of padding among the positions computed before the first new token."""
    real = computed = 0
    for wave in waves:
        real += sum(group.opening for group in wave.groups)
        computed += len(wave.groups) * max(group.opening for group in wave.groups)
        for batch in () if wave.whole else wave.batches:
            lengths = [len(prompts[question].rest) for question in batch]
            real += sum(lengths)
            computed += len(lengths) * max(lengths)
    return 1 - real / computed if computed else 0.0
