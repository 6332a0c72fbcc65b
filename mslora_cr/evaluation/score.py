"""Score an answer file: the published `metrics.txt` byte for byte, and the same at full precision."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from tabulate import tabulate

from mslora_cr.clinical.asked import AskedAnswer, asked_answers, typed_columns
from mslora_cr.clinical.file import CLINICAL
from mslora_cr.clinical.measure import clinical_of
from mslora_cr.data.answers.boxes import PIXELS, BoxRule
from mslora_cr.data.records import AnswerType, DataError, TestRecord
from mslora_cr.evaluation.benchmark import benchmark_columns, box_columns, box_rows
from mslora_cr.evaluation.schemas import METRICS_FILE, Metrics
from mslora_cr.metrics.guessing import Frequencies
from mslora_cr.metrics.published import Scores, score_answers
from mslora_cr.metrics.words import bleu_influence, corpus_bleu
from mslora_cr.statistics import intervals
from mslora_cr.statistics.interval import CONFIDENCE, Interval
from mslora_cr.statistics.intervals import estimate, percent, percentile_interval, resampled_sums, score_interval
from mslora_cr.utils.errors import first_problem
from mslora_cr.utils.files import write_text
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import JsonError, decode_json
from mslora_cr.utils.workers import worker_pool

SCORES = "scores.csv"
BOXES = "boxes.jsonl"
"""Beside answers of which some are boxes: by question, what was said and is true, in pixels."""
IMAGE_AND_GROUP = ("image", "group")
"""The last columns of `scores.csv`: the question's image, and what it shares with the questions that it is not
independent of, its patient or else its image. Empty where that is not known."""
PATIENT = "patient "
"""What a group begins with that is a patient."""
PROBABILITIES_FILE = "probabilities.jsonl"
"""Beside answers that come with probabilities (`evaluation.probabilities`)."""
CORPUS_BLEU = "corpus bleu"
"""BLEU of all open answers at once; no answer has a score in it."""
BATCH = 1000
"""Answers that a worker process scores at once."""
CSV_HEADER = ("id", "question", "pred", "answer", "answer_type", "image")


def _identifier(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("should be a string or an integer")
    return value


def _scalar(value: Any) -> Any:
    """A list scored as Python spells it, or null read as the word None, would count right answers as wrong."""
    if value is None or isinstance(value, list | dict):
        raise ValueError("should be one text or number; give each of several true answers a line of its own")
    return value


def _answer(value: Any) -> Any:
    """Null is no answer; it is not the word None, which may be the truth."""
    return "" if value is None else value


class AnswerRecord(BaseModel):
    """One line of an answer file; fields that scoring does not need are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    question_id: Annotated[int | str, BeforeValidator(_identifier)]
    prompt: str
    text: Annotated[Any, BeforeValidator(_answer)]
    gt: Annotated[Any, BeforeValidator(_scalar)]
    answer_type: AnswerType
    image: Any = None
    patient: Any = None


class ScoreTable(NamedTuple):
    """`scores.csv`: the questions' ids in order, by metric their scores in [0, 1], NaN where there is none, the number
    of each question's cluster, and its image's name and patient, empty where they are not known."""

    ids: list[str]
    columns: dict[str, intervals.Scores]
    groups: intervals.Groups
    images: Sequence[str] = ()
    patients: Sequence[str] = ()


def read_answers(path: Path) -> list[AnswerRecord]:
    """Read a JSON-lines file of answers; blank lines are skipped, and a file without a line is no error.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object in UTF-8 or has a wrong or no value
            in a field; the message names file, line and field.
    """
    try:
        lines = check_regular(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def score_file(
    answers: Path,
    output: Path,
    questions: Sequence[TestRecord] | None = None,
    workers: int = 1,
    training: Frequencies | None = None,
    temperature: float | None = None,
    model: Path | None = None,
) -> Scores:
    """Score the file `answers`; `metrics.txt`, `metrics.json`, `clinical.json`, `scores.csv`, `hit.csv` and
    `not_hit.csv` go to `output`, and `boxes.jsonl` where answers are boxes.

    `scores.csv` has each answer's score in each metric, in [0, 1], and the question's image; questions of a public
    benchmark are also scored by its own scorer. `hit.csv` and `not_hit.csv` divide the answers row by row, also where
    question ids repeat. Each file appears whole or not at all.

    Args:
        questions: The questions in the answers' order; they name each one's image and patient. Without
            them, the answers' own `image` and `patient` count.
        workers: Processes that share the answers of a large file.
        training: How often each answer follows each question in training, which says what guessing gives.
        temperature: The temperature of the candidates' probabilities, fitted on validation questions.
        model: The base model's folder, which says how boxes are written; without it, boxes are in pixels.

    Raises:
        DataError: As `read_answers`, or there are more or fewer questions than answers.
        UserError: A benchmark's captions cannot be scored (`metrics.captions`).
    """
    records = read_answers(answers)
    keys = _answer_groups(answers, records, questions)
    asked = _asked(records, questions, probabilities_of(answers, len(records)))
    boxes = box_rows(records, questions, lambda: _box_rule(model))
    further = benchmark_columns(records, questions) | box_columns(boxes)
    scores = replace(_score(records, workers), typed=typed_columns(asked), benchmark=further)
    groups = group_numbers([group for _, group in keys])
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "metrics.txt", render_metrics(scores))
    metrics_of(scores, groups).write(output / METRICS_FILE)
    clinical_of(asked, groups, training, temperature).write(output / CLINICAL)
    write_text(output / SCORES, _render_scores(records, scores, keys))
    if any(boxes):
        write_text(output / BOXES, "".join(json.dumps(row and row._asdict()) + "\n" for row in boxes))
    for name, wanted in (("hit.csv", True), ("not_hit.csv", False)):
        chosen = (record for record, row in zip(records, scores.rows, strict=True) if row.hit is wanted)
        write_text(output / name, _render_csv(chosen))
    return scores


@lru_cache(maxsize=8)
def _box_rule(model: Path | None) -> BoxRule:
    if model is None:
        return PIXELS
    # Reading a processor needs torch, which scoring an answer file alone does without.
    from mslora_cr.models.load import box_rule_of

    return box_rule_of(model)


def asked_in(answers: Path, questions: Sequence[TestRecord]) -> list[AskedAnswer]:
    """Return a file of answers with what is known of their questions and probabilities."""
    records = read_answers(answers)
    return _asked(records, questions, probabilities_of(answers, len(records)))


def score_records(records: Sequence[AnswerRecord], questions: Sequence[TestRecord] | None = None) -> Scores:
    """Return the scores of answers; without questions, as far as their file alone says."""
    return replace(score_answers(records), typed=typed_columns(_asked(records, questions, None)))


def _asked(
    records: Sequence[AnswerRecord],
    questions: Sequence[TestRecord] | None,
    probabilities: Sequence[Mapping[str, float] | None] | None,
) -> list[AskedAnswer]:
    said = [(row.prompt, str(row.text), str(row.gt), row.answer_type == "CLOSED") for row in records]
    return asked_answers(said, questions, probabilities)


def probabilities_of(answers: Path, questions: int) -> list[dict[str, float] | None] | None:
    """Return the probability of each candidate answer, by question; None where no file beside the answers states it
    for these questions."""
    path = answers.with_name(PROBABILITIES_FILE)
    if not path.is_file():
        return None
    # Reading them needs torch, which scoring an answer file alone does without.
    from mslora_cr.evaluation.probabilities import read_probabilities

    rows = read_probabilities(path)
    if len(rows) != questions:
        return None
    chances = [(row.candidates, row.probabilities()) for row in rows]
    return [dict(zip(names, values, strict=True)) if names and values else None for names, values in chances]


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
    """Return the published `metrics.txt`, which ends without a newline."""
    return tabulate(list(scores.metrics.items()), headers=["Metric", "Performance"])


def metrics_of(scores: Scores, groups: intervals.Groups) -> Metrics:
    """Return the content of `metrics.json`.

    Args:
        groups: (answers,), the number of each answer's cluster.
    """
    metrics = scores.metrics | scores.added
    ends, estimates = {}, {}
    for name in metrics:
        column = np.array(scores.columns[name], dtype=np.float64)
        scored = ~np.isnan(column)
        estimates[name] = estimate(column[scored], groups[scored])
        ends[name] = percent(score_interval([estimates[name]]))
    opened = np.array([row.ngrams is not None for row in scores.rows], dtype=bool)
    if opened.any():
        counts = np.array([row.ngrams for row in scores.rows if row.ngrams is not None], dtype=np.float64)
        metrics[CORPUS_BLEU] = 100 * float(corpus_bleu(counts.sum(axis=0, keepdims=True))[0])
        estimates[CORPUS_BLEU] = estimate(bleu_influence(counts), groups[opened])
        ends[CORPUS_BLEU] = percent(_bleu_interval(counts, groups[opened], estimates[CORPUS_BLEU].freedom))
    return Metrics(
        metrics=metrics,
        intervals=ends,
        confidence=CONFIDENCE,
        empty_truths=sum(not row.reference for row in scores.rows),
        rows=len(scores.rows),
        groups=len(np.unique(groups)),
        freedom={name: scored.freedom for name, scored in estimates.items()},
        largest_cluster={name: scored.largest for name, scored in estimates.items()},
        open=scores.open,
        closed=scores.closed,
    )


def _bleu_interval(counts: intervals.Scores, groups: intervals.Groups, freedom: float) -> Interval:
    """Return the interval of corpus BLEU: of resamplings, or, where these are all alike and would give it no width (no
    answer shares four words with its truth, or all are right), that of any score which every answer has.

    Args:
        counts: (answers, 10), n-gram counts.
        groups: (answers,), the number of each answer's cluster.
    """
    replicates = corpus_bleu(resampled_sums(counts, groups))
    if np.ptp(replicates) < intervals.NONE:
        return score_interval([estimate(np.full(len(counts), replicates[0]), groups)])
    return percentile_interval(replicates, freedom + 1)


def read_scores(path: Path) -> ScoreTable:
    """Return `scores.csv`. Earlier versions wrote no `IMAGE_AND_GROUP`: every question is then a cluster of its own.

    Raises:
        DataError: It is missing or not such a file.
    """
    try:
        with check_regular(path).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        columns = dict(zip(header, zip(*rows, strict=True) if rows else [()] * len(header), strict=True))
        ids, groups = columns.pop("question_id"), columns.pop("group", None)
        columns.pop("answer_type", None)
        images = columns.pop("image", [""] * len(ids))
        values = {name: np.array([float(score or "nan") for score in column]) for name, column in columns.items()}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(f"{path}: no scores of answers ({error}); evaluate or score them again") from None
    labels = [""] * len(ids) if groups is None else [*groups]
    patients = [
        label.removeprefix(PATIENT) if label.startswith(PATIENT) and label != image else ""
        for label, image in zip(labels, images, strict=True)
    ]
    return ScoreTable([*ids], values, group_numbers(labels), [*images], patients)


def group_numbers(labels: Sequence[str]) -> intervals.Groups:
    """Number labels, equal ones equally, in the order in which they come; each empty label a number of its own."""
    numbers: dict[str | int, int] = {}
    of_each = [numbers.setdefault(label or index, len(numbers)) for index, label in enumerate(labels)]
    return np.array(of_each, dtype=np.int64)


def _answer_groups(
    answers: Path, records: Sequence[AnswerRecord], questions: Sequence[TestRecord] | None
) -> list[tuple[str, str]]:
    """Return the `IMAGE_AND_GROUP` of each answer."""
    if questions is None:
        return [_image_and_group(_first(record.image), record.patient) for record in records]
    if len(questions) != len(records):
        raise DataError(f"{answers}: has {len(records)} answers to {len(questions)} questions; answer them again")
    return question_groups(questions)


def answer_groups(records: Iterable[AnswerRecord]) -> intervals.Groups:
    """Return the number of each answer's cluster, as far as the answers themselves name images or patients."""
    return group_numbers([_image_and_group(_first(record.image), record.patient)[1] for record in records])


def question_groups(questions: Iterable[TestRecord]) -> list[tuple[str, str]]:
    """Return the `IMAGE_AND_GROUP` of each question."""
    return [_image_and_group(next(iter(question.images), ""), question.patient) for question in questions]


def _image_and_group(image: str, patient: Any) -> tuple[str, str]:
    return image, image if patient is None else f"{PATIENT}{patient}"


def _first(image: Any) -> str:
    names = image if isinstance(image, list) else [image]
    return str(names[0]) if names and names[0] is not None else ""


def _parse(line: bytes, location: str) -> AnswerRecord:
    try:
        value = decode_json(line)
    except JsonError as error:
        raise DataError(f"{location}: not a line of JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object ({{…}}), found {type(value).__name__}")
    try:
        return AnswerRecord.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{location}: {first_problem(error)}") from None


def _render_scores(records: Iterable[AnswerRecord], scores: Scores, keys: Iterable[tuple[str, str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("question_id", "answer_type", *scores.columns, *IMAGE_AND_GROUP))
    for record, image, *row in zip(records, keys, *scores.columns.values(), strict=True):
        writer.writerow((record.question_id, record.answer_type, *row, *image))
    return text.getvalue()


def _render_csv(records: Iterable[AnswerRecord]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_HEADER)
    for record in records:
        prediction, truth = str(record.text).lower(), str(record.gt).lower()
        writer.writerow((record.question_id, record.prompt, prediction, truth, record.answer_type, record.image))
    return text.getvalue()
