"""Score an answer file: the published `metrics.txt` byte for byte, and the same at full precision."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from tabulate import tabulate

from mslora_cr.data.records import DataError
from mslora_cr.evaluation import intervals
from mslora_cr.evaluation.metrics import AnswerType, Scores, score_answers
from mslora_cr.utils.errors import first_problem
from mslora_cr.utils.files import write_text
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.strict_json import JsonError, decode_json
from mslora_cr.utils.workers import worker_pool

SCORES = "scores.csv"
BATCH = 1000
"""Answers that a worker process scores at once."""
CSV_HEADER = ("id", "question", "pred", "answer", "answer_type", "image")


def _identifier(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("should be a string or an integer")
    return value


class AnswerRecord(BaseModel):
    """One line of an answer file; fields that scoring does not need are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    question_id: Annotated[int | str, BeforeValidator(_identifier)]
    prompt: str
    text: Any
    gt: Any
    answer_type: AnswerType
    image: Any = None


def read_answers(path: Path) -> list[AnswerRecord]:
    """Read a JSON-lines file of answers; blank lines are skipped, and a file without a line is no error.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object in UTF-8 or has a wrong or no value
            in a field; the message names file, line and field.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def score_file(answers: Path, output: Path, workers: int = 1) -> Scores:
    """Score the file `answers`; `metrics.txt`, `metrics.json`, `scores.csv`, `hit.csv`, `not_hit.csv` go to `output`.

    `scores.csv` has each answer's score in each metric, in [0, 1]. `hit.csv` and `not_hit.csv` part the answers row by
    row, also where question ids repeat. Each file appears whole or not at all: it is written under a temporary name
    and renamed.

    Args:
        workers: processes that share the answers of a large file.

    Raises:
        DataError: as `read_answers`.
    """
    records = read_answers(answers)
    scores = _score(records, workers)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "metrics.txt", render_metrics(scores))
    write_text(output / "metrics.json", json.dumps(summarize(scores), indent=2) + "\n")
    write_text(output / SCORES, _render_scores(records, scores))
    for name, wanted in (("hit.csv", True), ("not_hit.csv", False)):
        chosen = (record for record, row in zip(records, scores.rows, strict=True) if row.hit is wanted)
        write_text(output / name, _render_csv(chosen))
    return scores


def _score(records: Sequence[AnswerRecord], workers: int) -> Scores:
    batches = [records[start : start + BATCH] for start in range(0, len(records), BATCH)]
    with ExitStack() as stack:
        each: Any = map
        if workers > 1 and len(batches) > 2 * workers:  # with fewer, starting the workers would take longer
            each = stack.enter_context(worker_pool(workers)).map
        parts = progress_bar(
            each(score_answers, batches), "scores", len(batches), unit="k answers", disable=len(batches) < 10
        )
        return Scores(tuple(row for part in parts for row in part.rows))


def render_metrics(scores: Scores) -> str:
    """The published `metrics.txt`, which ends without a newline."""
    return tabulate(list(scores.metrics.items()), headers=["Metric", "Performance"])


def summarize(scores: Scores) -> dict[str, Any]:
    """The content of `metrics.json`: every metric in percent, with the ends of its bootstrap interval."""
    metrics = scores.metrics | scores.added
    table = np.array([scores.columns[name] for name in metrics], dtype=np.float64).T
    resampled = 100 * intervals.resampled_means(table) if metrics else table
    return {
        "metrics": metrics,
        "intervals": {name: intervals.interval(column) for name, column in zip(metrics, resampled.T, strict=True)},
        "bootstrap": {"samples": intervals.SAMPLES, "seed": intervals.SEED, "confidence": intervals.CONFIDENCE},
        "rows": len(scores.rows),
        "open": scores.open,
        "closed": scores.closed,
    }


def read_scores(path: Path) -> tuple[list[str], dict[str, intervals.Scores]]:
    """`scores.csv`: the questions' ids in order, and by metric their scores in [0, 1], NaN where there is none.

    Raises:
        DataError: it is missing or not such a file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        columns = zip(*rows, strict=True) if rows else [()] * len(header)
        ids, _, *scores = ([*column] for column in columns)
        values = (np.array([float(score or "nan") for score in column]) for column in scores)
        return ids, dict(zip(header[2:], values, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: no scores of answers ({error}); evaluate or score them again") from None


def _parse(line: bytes, place: str) -> AnswerRecord:
    try:
        value = decode_json(line)
    except JsonError as error:
        raise DataError(f"{place}: not a line of JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object ({{…}}), found {type(value).__name__}")
    try:
        return AnswerRecord.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{place}: {first_problem(error)}") from None


def _render_scores(records: Iterable[AnswerRecord], scores: Scores) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("question_id", "answer_type", *scores.columns))
    for record, *row in zip(records, *scores.columns.values(), strict=True):
        writer.writerow((record.question_id, record.answer_type, *row))
    return text.getvalue()


def _render_csv(records: Iterable[AnswerRecord]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_HEADER)
    for record in records:
        prediction, truth = str(record.text).lower(), str(record.gt).lower()
        writer.writerow((record.question_id, record.prompt, prediction, truth, record.answer_type, record.image))
    return text.getvalue()
