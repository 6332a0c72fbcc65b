"""Answers whose score depends on more than the model: cut at a limit, without a text, or with reasoning first."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.evaluation.probabilities import PROBABILITIES, read_probabilities
from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import read_answers

log = logging.getLogger(__name__)

WORTH_A_WARNING = 0.05
"""Unfinished answers are named if their share is at least this."""


def doubts_of(folder: Path) -> dict[str, Any]:
    """Return `Cell`'s counts of the answers in a folder."""
    rows = read_answers(folder / ANSWERS)
    answers = [str(row.text) for row in rows]
    probabilities = read_probabilities(folder / PROBABILITIES)
    finished = [of.finished for of in probabilities if of.finished is not None]
    longest = max((len(str(row.gt)) for row in rows), default=0)
    finals = [final_answer(answer) for answer in answers]
    cut = [final.text for final, of in zip(finals, probabilities, strict=False) if of.finished is False]
    reasons = Counter(of.reason for of in probabilities if of.reason not in (None, "stop"))
    return {
        "unfinished": finished.count(False) if finished else None,
        "overlong": sum(len(text) > longest for text in cut) if finished else None,
        "empty": sum(not answer.strip() for answer in answers),
        "thinking": sum(final.reasoned for final in finals),
        "truncated": sum(final.truncated for final in finals),
        "reasons": dict(sorted(reasons.items())) or None,
    }


def doubts_in_words(cell: Cell, max_new_tokens: int | None = None) -> list[str]:
    """Say what a reader of a cell's scores must know about its answers; empty if there is nothing.

    Args:
        max_new_tokens: The limit that cut them, if it is known.
    """
    doubts = []
    limit = "evaluation.max_new_tokens" + (f" = {max_new_tokens}" if max_new_tokens else "")
    if cell.unfinished and cell.unfinished >= WORTH_A_WARNING * cell.rows:
        share = f"{cell.unfinished} of {cell.rows} answers ({100 * cell.unfinished / cell.rows:.0f} %)"
        endless = (cell.overlong or 0) > cell.unfinished / 2
        why = "most are longer than any true answer, so the model does not end them" if endless else "raise it"
        doubts.append(f"{share} were cut off at {limit}, and are scored as they stand; {why}")
    if cell.empty:
        why = ", ".join(f"{reason}: {count}" for reason, count in (cell.reasons or {}).items())
        doubts.append(f"{cell.empty} of {cell.rows} answers are empty{f' (finish_reason {why})' if why else ''}")
    if cell.greedy is False:
        doubts.append("the server does not accept temperature 0, so its answers are not greedy")
    if cell.thinking:
        doubts.append(f"{cell.thinking} of {cell.rows} answers contain reasoning, and are scored by their final part")
    if cell.truncated:
        doubts.append(f"{cell.truncated} of {cell.rows} answers end within their reasoning or a marked answer")
    return doubts


def warn_of_doubts(cell: Cell, max_new_tokens: int) -> None:
    """Warn about what besides the model decides a cell's scores."""
    for doubt in doubts_in_words(cell, max_new_tokens):
        log.warning("%s at stage %d: %s", cell.task, cell.stage, doubt)
