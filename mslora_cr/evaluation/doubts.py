"""Answers whose score something else than the model decides: cut at a limit, without a text, or thought aloud."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from mslora_cr.evaluation.probabilities import PROBABILITIES, read_probabilities
from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import read_answers
from mslora_cr.metrics.thinking import thinks

log = logging.getLogger(__name__)

WORTH_A_WARNING = 0.05
"""The share of unfinished answers from which they are named."""


def doubts_of(folder: Path) -> dict[str, Any]:
    """`Cell`'s counts of the answers in a folder."""
    answers = [str(row.text) for row in read_answers(folder / ANSWERS)]
    probabilities = read_probabilities(folder / PROBABILITIES)
    finished = [of.finished for of in probabilities if of.finished is not None]
    reasons = Counter(of.reason for of in probabilities if of.reason not in (None, "stop"))
    return {
        "unfinished": finished.count(False) if finished else None,
        "empty": sum(not answer.strip() for answer in answers),
        "thinking": sum(map(thinks, answers)),
        "reasons": dict(sorted(reasons.items())) or None,
    }


def doubts_in_words(cell: Cell, max_new_tokens: int | None = None) -> list[str]:
    """What a reader of a cell's scores must know of its answers; empty where there is nothing.

    Args:
        max_new_tokens: the limit that cut them, where it is known.
    """
    doubts = []
    limit = "evaluation.max_new_tokens" + (f" = {max_new_tokens}" if max_new_tokens else "")
    if cell.unfinished and cell.unfinished >= WORTH_A_WARNING * cell.rows:
        share = f"{cell.unfinished} of {cell.rows} answers ({100 * cell.unfinished / cell.rows:.0f} %)"
        doubts.append(f"{share} were cut off at {limit}, and are scored as they stand; raise it")
    if cell.empty:
        why = ", ".join(f"{reason}: {count}" for reason, count in (cell.reasons or {}).items())
        doubts.append(f"{cell.empty} of {cell.rows} answers are empty{f' (finish_reason {why})' if why else ''}")
    if cell.greedy is False:
        doubts.append("the server does not take temperature 0, so that its answers are not greedy")
    if cell.thinking:
        doubts.append(f"{cell.thinking} of {cell.rows} answers think aloud first, which is not scored")
    return doubts


def warn_of_doubts(cell: Cell, max_new_tokens: int) -> None:
    """Say what decides a cell's scores besides the model."""
    for doubt in doubts_in_words(cell, max_new_tokens):
        log.warning("%s at stage %d: %s", cell.task, cell.stage, doubt)
