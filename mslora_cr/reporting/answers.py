"""Every answer of a run, question by question, over its stages: what the report's browser and its tables of
confusions show."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.boxes import Box
from mslora_cr.data.images import image_roots, resolve_image
from mslora_cr.data.records import DataError, shown_images
from mslora_cr.data.tasks import test_records
from mslora_cr.evaluation.probabilities import PROBABILITIES, read_probabilities
from mslora_cr.evaluation.results import Cell, Evaluation
from mslora_cr.evaluation.score import BOXES, SCORES, AnswerRecord, ScoreTable, read_answers, read_scores
from mslora_cr.metrics.published import HIT_RECALL, normalize_answer
from mslora_cr.metrics.typed import CHOICE
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import JsonError, decode_json

SAMPLED_RIGHT = 6
"""The browser shows this many right answers of a task beside the wrong ones before it is asked for all."""
MOST_CLASSES = 12
"""A table of confusions names this many truths of closed questions; it gathers rarer ones under `OTHER`."""
OTHER = "other"


Fractions = tuple[float, float, float, float]
"""A box by left, top, right and bottom, in shares of the picture's width and height."""


@dataclass(frozen=True)
class AnswerSet:
    """One answering of a task's questions.

    Attributes:
        stages: The stages for which it stands.
        banks: The banks that answered.
        hits: Whether each answer is right.
        scores: The score of each answer, in [0, 1] (closed: right or not; open: F1).
        confidences: The probability of each answer's tokens, None where unknown; empty where none is known.
        boxes: The box that each answer gives, and the true one; empty where no question is about a box.
    """

    stages: tuple[int, ...]
    banks: str
    texts: Sequence[str]
    hits: Sequence[bool]
    scores: Sequence[float]
    confidences: Sequence[float | None] = ()
    boxes: Sequence[tuple[Fractions | None, Fractions] | None] = ()


class QuestionKeys(NamedTuple):
    """What joins a question to the reader's own tables; empty where unknown.

    Attributes:
        id: The question's `question_id`.
        image: The name of its first image.
        patient: The patient whose image that is.
    """

    id: str
    image: str = ""
    patient: str = ""


@dataclass(frozen=True)
class TaskAnswers:
    """The questions of a task with their truths and kinds (`OPEN` or `CLOSED`), the answer sets by stage, and the
    picture files of each question, none where they are unknown.

    Attributes:
        learned_at: The number of the stage that learned the task.
        keys: Id, image and patient of each question.
    """

    task: str
    learned_at: int
    questions: Sequence[str]
    truths: Sequence[str]
    kinds: Sequence[str]
    sets: Sequence[AnswerSet]
    pictures: Sequence[Sequence[Path]]
    keys: Sequence[QuestionKeys]

    def at(self, stage: int) -> AnswerSet | None:
        """Return the answers at a stage, if it was evaluated."""
        return next((answers for answers in self.sets if stage in answers.stages), None)

    @property
    def learned(self) -> AnswerSet:
        """Return the answers at the task's own stage, or else at the last one that was evaluated."""
        return self.at(self.learned_at) or self.sets[-1]


@dataclass(frozen=True)
class Browsed:
    """The answers of all tasks, and what is missing among them, in words."""

    tasks: list[TaskAnswers] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def browsed_answers(evaluation: Evaluation, results_dir: Path, config: StreamConfig | None) -> Browsed:
    """Read the answers of an evaluation, and find their pictures.

    Args:
        config: Says where the test files and the images are; without it there are no pictures.

    Raises:
        DataError: An answer file or its scores are malformed.
    """
    browsed = Browsed()
    for task in evaluation.tasks:
        cells = [cell for cell in evaluation.cells if cell.task == task and (results_dir / cell.answers).is_file()]
        if not cells:
            continue
        table = read_scores((results_dir / cells[-1].answers).with_name(SCORES))
        pictures, problem = _pictures(task, cells[-1], table, config) if config else ([], None)
        if problem:
            browsed.missing.append(f"no pictures of {task}: {problem}")
        browsed.tasks.append(_task_answers(evaluation, task, cells, results_dir, pictures, table))
    return browsed


def _task_answers(
    evaluation: Evaluation,
    task: str,
    cells: Sequence[Cell],
    results_dir: Path,
    pictures: Sequence[Sequence[Path]],
    table: ScoreTable,
) -> TaskAnswers:
    stages: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.questions == cells[-1].questions:  # answers to an earlier file of questions appear in no row here
            stages[cell.answers].append(cell)
    sets, records = [], []
    for answers, shared in sorted(stages.items(), key=lambda item: item[1][0].stage):
        records = read_answers(results_dir / answers)
        hits, scores = _graded(records, (results_dir / answers).with_name(SCORES))
        numbers = tuple(cell.stage for cell in shared)
        banks, sure = evaluation.bank_numbers(shared[0]), _confidences(results_dir / answers, len(records))
        boxes = _boxes((results_dir / answers).with_name(BOXES), len(records))
        sets.append(AnswerSet(numbers, banks, _texts(records), hits, scores, sure, boxes))
    return TaskAnswers(
        task=task,
        learned_at=evaluation.tasks.index(task) + 1,
        questions=[record.prompt for record in records],
        truths=[str(record.gt) for record in records],
        kinds=[record.answer_type for record in records],
        sets=sets,
        pictures=pictures if len(pictures) == len(records) else [()] * len(records),
        keys=_keys(records, table),
    )


def _keys(records: Sequence[AnswerRecord], table: ScoreTable) -> list[QuestionKeys]:
    """Return the keys of each question, as far as the scores name them."""
    images = table.images if len(table.images) == len(records) else [""] * len(records)
    patients = table.patients if len(table.patients) == len(records) else [""] * len(records)
    return [
        QuestionKeys(str(record.question_id), image, patient)
        for record, image, patient in zip(records, images, patients, strict=True)
    ]


def _boxes(path: Path, questions: int) -> list[tuple[Fractions | None, Fractions] | None]:
    """Return the box that each answer gives and the true one; empty where the file is missing or belongs to other
    questions."""
    if not path.is_file():
        return []
    lines = [line for line in check_regular(path).read_bytes().split(b"\n") if line.strip()]
    try:
        rows = [_fractions(decode_json(line)) for line in lines]
    except (JsonError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{path}: no boxes of answers ({error}); score the answers again") from None
    return rows if len(rows) == questions else []


def _fractions(row: Any) -> tuple[Fractions | None, Fractions] | None:
    if row is None:
        return None
    said, true = (None if box is None else Box(*map(float, box)) for box in (row["said"], row["truth"]))
    if true is None:
        raise ValueError("a line without a true box")
    return said and said.shares(row["size"]), true.shares(row["size"])


def _texts(records: Iterable[AnswerRecord]) -> list[str]:
    return [str(record.text) for record in records]


def _confidences(answers: Path, questions: int) -> list[float | None]:
    """Return the probability of each answer's tokens; empty where no file states it for these questions."""
    rows = read_probabilities(answers.with_name(PROBABILITIES))
    if len(rows) != questions or all(row.logprob is None for row in rows):
        return []
    return [None if row.logprob is None else round(math.exp(row.logprob), 4) for row in rows]


def _graded(records: Sequence[AnswerRecord], scores: Path) -> tuple[list[bool], list[float]]:
    """Return whether each answer is right, and its score, from the scores beside the answers."""
    table = read_scores(scores)
    ids, metrics = table.ids, table.columns
    if len(ids) != len(records):
        raise DataError(f"{scores}: scores of {len(ids)} answers beside {len(records)}; score them again")
    if lacking := {"close accuracy", "recall", "f1 score"} - metrics.keys():
        raise DataError(f"{scores}: has no {', '.join(sorted(lacking))}; score the answers again")
    closed = np.array([record.answer_type == "CLOSED" for record in records], dtype=bool)
    chosen = metrics.get(CHOICE, metrics["close accuracy"])
    of_closed = np.where(np.isnan(chosen), metrics["close accuracy"], chosen) == 1
    right = np.where(closed, of_closed, metrics["recall"] > HIT_RECALL) if ids else closed
    score = np.where(closed, right, metrics["f1 score"]) if ids else closed
    return right.tolist(), score.astype(float).tolist()


def _pictures(task: str, cell: Cell, scores: ScoreTable, config: StreamConfig) -> tuple[list[list[Path]], str | None]:
    """Return the files of each question's pictures, in the order of the questions, or the reason in words why they are
    unknown."""
    settings = config.task(task)
    root = Path(config.data.root)
    names, problem = _image_names(settings, cell, scores, config)
    if problem is not None:
        return [], problem
    roots = image_roots(root, settings.folder, settings.image_folders)
    paths_of = {name: _resolved(name, roots) for name in dict.fromkeys(itertools.chain.from_iterable(names))}
    lacking = sum(not paths for paths in paths_of.values())
    problem = f"{lacking} of {len(paths_of)} images are missing below {root}" if lacking else None
    return [[path for name in row for path in paths_of[name]] for row in names], problem


def _image_names(
    task: Task, cell: Cell, scores: ScoreTable, config: StreamConfig
) -> tuple[Sequence[Sequence[str]], str | None]:
    """Return the images that each question showed, or the reason in words why they are unknown.

    The scores name the first image of each question. The file of the questions names further images, which
    `data.images: all` shows, and all images where an earlier version wrote the scores; it is used only if it is still
    the file that was asked from.
    """
    scored = [[name] if name else [] for name in scores.images]
    if any(scored) and config.data.images == "first":
        return scored, None
    try:
        records = test_records(config, task)
        problem = None if records.digest == cell.questions else f"{records.path} is not the file that was asked from"
    except DataError as error:
        problem = str(error)
    if problem is None:
        return [shown_images(record, config.data.images == "all") for record in records], None
    return (scored, None) if any(scored) else ([], problem)


def _resolved(name: str, roots: Sequence[Path]) -> list[Path]:
    try:
        return [resolve_image(name, roots)]
    except DataError:
        return []


def browser_data(
    tasks: Sequence[TaskAnswers], colors: dict[str, str], thumbnails: dict[Path, str], last: int
) -> dict[str, Any]:
    """Return the data of the page's script, as JSON; equal answers to a question are written once.

    Args:
        thumbnails: What an `img` loads, by picture.
        last: The last stage of the stream.
    """
    used = dict.fromkeys(path for task in tasks for paths in task.pictures for path in paths if path in thumbnails)
    numbers = {path: index for index, path in enumerate(used)}
    return {
        "last": last,
        "thumbnails": [thumbnails[path] for path in used],
        "tasks": [
            {
                "name": task.task,
                "color": colors.get(task.task),
                "learned_at": task.learned_at,
                "sets": [
                    {"stages": given.stages, "banks": given.banks, "sure": given.confidences} for given in task.sets
                ],
                "rows": _rows(task, numbers),
                "keys": task.keys,
            }
            for task in tasks
        ],
    }


def _rows(task: TaskAnswers, numbers: dict[Path, int]) -> list[list[Any]]:
    """Return for each question: text, truth, whether it is closed, pictures, [answer, right, score, box] of each
    different answer, which of those each set gave, whether the browser shows it at first, and the true box, if any."""
    hits = task.learned.hits
    right = [index for index, hit in enumerate(hits) if hit]
    sampled = set(random.Random(0).sample(right, min(SAMPLED_RIGHT, len(right))))
    rows: list[list[Any]] = []
    for index, question in enumerate(task.questions):
        given: dict[tuple[Any, ...], int] = {}
        which, true = [], None
        for answers in task.sets:
            boxes = answers.boxes[index] if answers.boxes else None
            said = (answers.texts[index], int(answers.hits[index]), round(answers.scores[index], 3))
            which.append(given.setdefault(said if boxes is None else (*said, boxes[0]), len(given)))
            true = boxes[1] if boxes else true
        pictures = [numbers[path] for path in task.pictures[index] if path in numbers]
        closed = int(task.kinds[index] == "CLOSED")
        row = [question, task.truths[index], closed, pictures, list(given), which, int(index in sampled)]
        rows.append(row if true is None else [*row, true])
    return rows


def confusions(task: TaskAnswers, answers: AnswerSet) -> tuple[list[str], dict[str, list[int]]]:
    """Compute the confusion table: for each truth of the closed questions (rows), the number of answers by predicted
    truth (columns).

    A right answer counts as its truth. A wrong one counts as the truth that it equals once normalised, or as `OTHER`.

    Returns:
        The columns, and the counts by row, most frequent truths first; empty where no question is closed.
    """
    closed = [index for index, kind in enumerate(task.kinds) if kind == "CLOSED"]
    truths = {index: normalize_answer(task.truths[index].lower()) for index in closed}
    frequent = [truth for truth, _ in Counter(truths.values()).most_common(MOST_CLASSES)]
    pairs: Counter[tuple[str, str]] = Counter()
    for index, truth in truths.items():
        said = truth if answers.hits[index] else normalize_answer(answers.texts[index].lower())
        pairs[truth if truth in frequent else OTHER, said if said in frequent else OTHER] += 1
    rows = [*frequent, *([OTHER] if any(truth == OTHER for truth, _ in pairs) and OTHER not in frequent else [])]
    columns = [*frequent, *([OTHER] if any(said == OTHER for _, said in pairs) and OTHER not in frequent else [])]
    return columns, {row: [pairs[row, column] for column in columns] for row in rows}
