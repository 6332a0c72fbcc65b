"""Some answered questions of a task, for reports without room for all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from mslora_cr.evaluation.score import AnswerRecord
from mslora_cr.metrics.published import score_answers


class Example(NamedTuple):
    """An answered question, and whether the answer counts as a hit."""

    question: str
    answer: str
    truth: str
    hit: bool


def pick_examples(answers: Sequence[AnswerRecord], of_each: int = 2) -> list[Example]:
    """Up to `of_each` right and as many wrong answers, the same ones at every call; right ones come first."""
    picked: dict[bool, list[Example]] = {True: [], False: []}
    for answer in random.Random(0).sample(answers, len(answers)):
        if all(len(examples) == of_each for examples in picked.values()):
            break
        hit = score_answers([answer]).rows[0].hit
        if len(picked[hit]) < of_each:
            picked[hit].append(Example(answer.prompt, str(answer.text), str(answer.gt), hit))
    return picked[True] + picked[False]
