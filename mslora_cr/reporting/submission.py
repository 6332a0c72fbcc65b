"""A run's results as one archive for a leaderboard, and the reading of such archives, which trusts no figure in them.

The archive holds answers, scores, `evaluation.json`, configuration and ledger, and `submission.json` with the digest of
each. A reader scores the answers again and refuses an archive whose figures differ. What the answers cannot show, cost
and digests of weights, is its author's word.
"""

from __future__ import annotations

import csv
import io
import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from zipfile import ZipInfo

import yaml
from pydantic import ValidationError

from mslora_cr.config.run_files import CONFIG, EVALUATION, LEDGER
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.boxes import PIXELS, BoxRule
from mslora_cr.data.listed import ListedQuestion
from mslora_cr.data.records import TestRecord
from mslora_cr.data.sources.raw import RawData, extract
from mslora_cr.data.tasks import test_file, test_records
from mslora_cr.evaluation.benchmark import benchmark_columns, box_columns, box_rows
from mslora_cr.evaluation.results import Cell, ReportError, required_evaluation
from mslora_cr.evaluation.score import (
    BOXES,
    SCORES,
    AnswerRecord,
    ScoreTable,
    metrics_of,
    read_answers,
    read_scores,
    score_records,
)
from mslora_cr.metrics.captions import METEOR
from mslora_cr.metrics.published import Scores
from mslora_cr.models.load import box_rule_of
from mslora_cr.utils.files import file_digest, replacing, write_text
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.state import StateFile
from mslora_cr.utils.strict_json import JsonError, decode_json

MANIFEST, QUESTIONS = "submission.json", "questions.jsonl"
EQUAL = 1e-6
"""In percent: other versions of NumPy add in another order."""
MOST_BYTES = 4 << 30
"""No benchmark's answers come near this; it bounds what an archive can make us write."""
FIRST_DATE = (1980, 1, 1, 0, 0, 0)


class Submission(StateFile):
    """`submission.json`: what an archive holds.

    Attributes:
        files: The digest of every other file, by its name in the archive.
        box_rule: How the base model writes boxes (`BoxRule`), where some answers are boxes.
    """

    MEND: ClassVar[str] = "`mslora-cr submit RUN` writes the archive again"

    run: str
    files: dict[str, str]
    box_rule: BoxRule | None = None


def write_submission(config: StreamConfig, results: Path, output: Path) -> Path:
    """Pack an evaluated run; two archives of the same results are equal byte for byte.

    Names of patients and images become numbers. Questions, true answers and the model's answers are in it as they are.

    Args:
        results: The results folder, or `routed` in it.

    Raises:
        ReportError: The run is not evaluated, or its figures are not those of its answers.
        DataError: A benchmark's questions are gone.
    """
    evaluation = required_evaluation(results)
    with TemporaryDirectory(prefix="mslora-cr-") as temporary:
        folder = Path(temporary)
        cells = [_pack_cell(config, results, cell, folder) for cell in evaluation.cells]
        evaluation.model_copy(update={"cells": tuple(cells)}).write(folder / EVALUATION)
        write_text(folder / CONFIG, yaml.safe_dump(_shareable(config), sort_keys=False, allow_unicode=True))
        if (config.run_dir / LEDGER).is_file():
            shutil.copyfile(config.run_dir / LEDGER, folder / LEDGER)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        digests = {name: file_digest(folder / name) for name in names}
        boxed = any((results / cell.answers).with_name(BOXES).is_file() for cell in evaluation.cells)
        manifest = Submission(run=evaluation.run, files=digests)
        if boxed:
            manifest = Submission(run=evaluation.run, files=digests, box_rule=box_rule_of(Path(config.model.path)))
        manifest.write(folder / MANIFEST)
        check_scores(folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name in [MANIFEST, *names]:
                archive.writestr(ZipInfo(name, FIRST_DATE), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return output


def open_submission(archive: Path, folder: Path) -> Path:
    """Unpack an archive into a new folder, which is then a results folder, and check all of it.

    Raises:
        DataError: It is no zip archive, is damaged, or would write outside of the folder or without end.
        ReportError: It holds other files than it says, or its figures are not those of its answers.
        StateError: A file of it is malformed.
    """
    with RawData([archive], folder / "work") as data:
        members = {"/".join(file.path.parts[1:]): file for file in data.files}
        if len(members) < len(data.files) or sum(file.size for file in data.files) > MOST_BYTES:
            raise ReportError(f"{archive}: refused: a name stands in it twice, or it unpacks to more than 4 GB")
        if MANIFEST not in members:
            raise ReportError(f"{archive}: has no {MANIFEST}; an archive of `mslora-cr submit RUN` is expected")
        extract({file: [folder / name] for name, file in members.items()})
    manifest = Submission.read(folder / MANIFEST)
    for name in sorted({*members, *manifest.files} - {MANIFEST}):
        given = file_digest(folder / name) if name in members else None
        if given is None or given != manifest.files.get(name):
            raise ReportError(f"{archive}: {name} is not the file that {MANIFEST} names; ask for the archive again")
    try:
        check_scores(folder)
    except ReportError as error:
        raise ReportError(f"{archive}: {str(error).removeprefix(f'{folder}/')}") from None
    return folder


def check_scores(folder: Path) -> None:
    """Score the answers of an unpacked archive again.

    Raises:
        ReportError: A figure of `evaluation.json` or `scores.csv` is another, or it cannot be computed here.
    """
    evaluation, rule = required_evaluation(folder), Submission.read(folder / MANIFEST).box_rule or PIXELS
    scored: dict[str, tuple[Scores, ScoreTable]] = {}
    for cell in evaluation.cells:
        if cell.answers not in scored:
            scored[cell.answers] = _scored(folder, cell, rule)
        scores, table = scored[cell.answers]
        measured = metrics_of(scores, table.groups)
        where = f"{cell.task} at stage {cell.stage}"
        if cell.rows != len(table.ids):
            raise ReportError(f"{where}: says {cell.rows} answers, has {len(table.ids)}")
        for name in {*measured.metrics, *cell.metrics}:
            _check_equal(f"{where}: {name}", [cell.metrics.get(name)], [measured.metrics.get(name)])
            ends = [*cell.intervals.get(name, ())], [*measured.intervals.get(name, ())]
            _check_equal(f"{where}: the interval of {name}", *ends)


def _scored(folder: Path, cell: Cell, rule: BoxRule) -> tuple[Scores, ScoreTable]:
    """Return a cell's answers scored again, and `scores.csv` beside them, which must say the same."""
    path = folder / cell.answers
    answers, table = read_answers(path), read_scores(path.with_name(SCORES))
    questions = _read_questions(path.with_name(QUESTIONS), answers)
    benchmark = benchmark_columns(answers, questions, java=METEOR in table.columns)
    boxes = box_columns(box_rows(answers, questions, lambda: rule))
    scores = replace(score_records(answers, questions), benchmark=benchmark | boxes)
    where = f"{cell.task}: {SCORES}"
    if table.ids != [str(answer.question_id) for answer in answers] or table.columns.keys() != scores.columns.keys():
        raise ReportError(f"{where} is of other answers, or has other scores")
    for name, column in scores.columns.items():
        given = [None if math.isnan(score) else 100 * float(score) for score in table.columns[name]]
        _check_equal(f"{where}: {name}", given, [None if score is None else 100 * score for score in column])
    return scores, table


def _check_equal(what: str, given: Sequence[float | None], computed: Sequence[float | None]) -> None:
    """Refuse figures, in percent, that the answers do not give."""
    if len(given) != len(computed):
        raise ReportError(f"{what} is missing, or is none that the answers have")
    for theirs, ours in zip(given, computed, strict=True):
        if _differ(theirs, ours):
            raise ReportError(f"{what} is given as {theirs}; its answers give {ours}")


def _differ(theirs: float | None, ours: float | None) -> bool:
    if theirs is None or ours is None:
        return theirs is not ours
    return not math.isclose(theirs, ours, rel_tol=0, abs_tol=EQUAL)


def _pack_cell(config: StreamConfig, results: Path, cell: Cell, folder: Path) -> Cell:
    """Copy a cell's answers, its scores without names, and what its benchmark's scorer needs; returns its entry."""
    source, target = results / cell.answers, folder / cell.answers
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    _write_anonymous(source.with_name(SCORES), target.with_name(SCORES))
    task = config.task(cell.task)
    if questions := _questions(config, task, cell):
        lines = [question.model_dump_json(by_alias=True, exclude_defaults=True) for question in questions]
        write_text(target.with_name(QUESTIONS), "".join(f"{line}\n" for line in lines))
    return cell.model_copy(update={"scores_sha256": file_digest(target.with_name(SCORES))})


def _questions(config: StreamConfig, task: Task, cell: Cell) -> list[TestRecord]:
    """Return the questions, which say how answers are scored; those of no benchmark without names of images and
    patients, and only from the file that was asked from.
    """
    if task.benchmark is not None:
        return list(test_records(config, task))
    if not test_file(config, task).is_file():
        return []
    records = test_records(config, task)
    hidden: dict[str, Any] = {"patient": None, "attributes": {}}
    if records.digest != cell.questions:
        return []
    return [record.model_copy(update={"images": ("image",) * len(record.images), **hidden}) for record in records]


def _write_anonymous(scores: Path, target: Path) -> None:
    """Write `scores.csv` with a number for each cluster and no image's name."""
    groups = read_scores(scores).groups
    with scores.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    for row, group in zip(rows, groups, strict=True):
        anonymous = {**dict(zip(header, row, strict=True)), "image": "", "group": f"group {group}"}
        writer.writerow(anonymous[name] for name in header)
    write_text(target, text.getvalue())


def _shareable(config: StreamConfig) -> dict[str, Any]:
    """Return the configuration without the places of this machine."""
    settings = config.model_dump(mode="json", exclude={"output_dir", "results_dir"})
    settings["data"]["root"], settings["model"]["path"] = Path(config.data.root).name, Path(config.model.path).name
    return settings


def _read_questions(path: Path, answers: Sequence[AnswerRecord]) -> list[ListedQuestion] | None:
    """Return the questions of a public benchmark, in the answers' order; None where there are none."""
    if not path.is_file():
        return None
    lines = [line for line in check_regular(path).read_bytes().split(b"\n") if line.strip()]
    try:
        questions = [ListedQuestion.model_validate(decode_json(line)) for line in lines]
    except (JsonError, ValidationError) as error:
        raise ReportError(f"{path}: no questions of a benchmark ({str(error).splitlines()[0]})") from None
    asked = [(str(question.question_id), question.gt) for question in questions]
    if asked != [(str(answer.question_id), str(answer.gt)) for answer in answers]:
        raise ReportError(f"{path}: other questions or true answers than those that were answered")
    return questions
