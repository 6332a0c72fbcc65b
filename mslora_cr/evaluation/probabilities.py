"""Probabilities of a model's answers, and of each candidate answer of a closed question: `probabilities.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.records import DataError, TestRecord
from mslora_cr.generation.branches import Continuations
from mslora_cr.utils.errors import first_problem
from mslora_cr.utils.files import replacing
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import JsonError, decode_json

PROBABILITIES = "probabilities.jsonl"


class AnswerProbability(BaseModel):
    """How likely an answer was and how it ended. A field is None where that is unknown.

    Attributes:
        tokens: Number of the answer's tokens, the end token included.
        finished: Whether the model ended the answer. False if it reached the limit on new tokens.
        reason: Why a served model stopped, in its words.
        logprob: Log-probability of the answer, ``Σ_t log p(token t)``.
        logprob_first: Log-probability of the answer's first token.
        candidates: The answers of the question's closed set; empty where it has none.
        logprobs: Log-likelihood of each candidate after the same question, ``Σ_t log softmax(logits_t)[c_t]``, the end
            token included; None for a candidate that a server did not report.
        lengths: Number of each candidate's tokens, the end token included; 1 each for a served model.
    """

    model_config = ConfigDict(frozen=True)

    tokens: int | None = None
    finished: bool | None = None
    reason: str | None = None
    logprob: float | None = None
    logprob_first: float | None = None
    candidates: tuple[str, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def logprob_mean(self) -> float | None:
        return None if self.logprob is None or not self.tokens else self.logprob / self.tokens

    def probabilities(self, normalized: bool = False) -> tuple[float, ...] | None:
        """Return ``p_k = exp(l_k) / Σ_j exp(l_j)`` over the candidates; None if one of them is unknown.

        Args:
            normalized: Normalise by length: ``l_k / |c_k|`` in place of ``l_k``.
        """
        scores = self._scores(normalized)
        if not scores:
            return None
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    @property
    def share(self) -> float | None:
        """Probability of all candidates together, ``Σ_k exp(l_k)``: near 0 where the question was not understood."""
        scores = self._scores(False)
        return sum(map(math.exp, scores)) if scores else None

    def _scores(self, normalized: bool) -> list[float]:
        if any(score is None for score in self.logprobs):
            return []
        lengths = self.lengths if normalized else [1] * len(self.logprobs)
        return [score / length for score, length in zip(self.logprobs, lengths, strict=True) if score is not None]

    def row(self, question_id: int | str) -> dict[str, Any]:
        """Return a line of `probabilities.jsonl`, with the derived values."""
        return {
            "question_id": question_id,
            **self.model_dump(),
            "logprob_mean": self.logprob_mean,
            "p": self.probabilities(),
            "p_normalized": self.probabilities(normalized=True),
            "share": self.share,
        }


def continuations_of(
    records: Iterable[TestRecord], processor: InputProcessor, candidates: Sequence[tuple[str, ...]]
) -> Callable[[int, Sequence[int]], Continuations]:
    """Return the continuations to score after each question: the answer that it got, then its candidates."""
    asked, answer_ids = list(records), cache(processor.answer_ids)  # One question is often asked about many images.

    def continuations(question: int, ids: Sequence[int]) -> Continuations:
        record = asked[question]
        images = len(processor.image_names(record))
        return [ids, *(answer_ids(record.question, images, answer) for answer in candidates[question])]

    return continuations


def probability_of(
    ids: Sequence[int], ends: Sequence[int], candidates: tuple[str, ...], scores: Sequence[Sequence[float]] | None
) -> AnswerProbability:
    """Return the probabilities of an answer's ids and of what was scored after its question, in the order of
    `continuations_of`."""
    finished = ids[-1] in ends
    if scores is None:
        return AnswerProbability(tokens=len(ids), finished=finished)
    first, *others = scores
    return AnswerProbability(
        tokens=len(ids),
        finished=finished,
        logprob=round(sum(first), 6),
        logprob_first=round(first[0], 6),
        candidates=candidates,
        logprobs=tuple(round(sum(score), 6) for score in others),
        lengths=tuple(map(len, others)),
    )


def write_probabilities(
    path: Path, records: Iterable[TestRecord], probabilities: Mapping[int, AnswerProbability | None]
) -> None:
    """Write the file, a line for each question; no file if nothing is known of any."""
    path.unlink(missing_ok=True)
    if any(value is not None for value in probabilities.values()):
        rows = (
            (probabilities.get(number) or AnswerProbability()).row(of.question_id) for number, of in enumerate(records)
        )
        write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_probabilities(path: Path) -> list[AnswerProbability]:
    """Return the probabilities beside an answer file, in the questions' order; empty if there is no file.

    Raises:
        DataError: A line is malformed; the message names file and line.
    """
    if not path.is_file():
        return []
    probabilities = []
    for number, line in enumerate(check_regular(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                probabilities.append(AnswerProbability.model_validate(decode_json(line)))
            except ValidationError as error:
                raise DataError(f"{path}: line {number}: {first_problem(error)}") from None
            except JsonError as error:
                raise DataError(f"{path}: line {number}: {error}") from None
    return probabilities
