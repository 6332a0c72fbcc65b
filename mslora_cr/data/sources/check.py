"""`mslora-cr data check ROOT`: checks the data before training starts.

Errors would stop a run or spoil it; warnings are worth knowing. Memory is bounded by the image names and the short
answers of one data set, whatever the annotations hold.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from mslora_cr.config.benchmarks import Benchmark
from mslora_cr.data.advice import missing_annotations
from mslora_cr.data.images import check_name, image_roots, inspect_images, resolve_image
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.sources.catalog import DataSet, TestRows
from mslora_cr.data.sources.check_report import Problem, Report, Share
from mslora_cr.data.sources.data_card import data_card
from mslora_cr.data.sources.leaks import Leaks, remember
from mslora_cr.data.sources.question_checks import (
    check_lengths,
    check_prompt_lengths,
    check_questions,
    look_at_questions,
    questions_about,
    shared_patients,
    test_questions,
    training_questions,
)
from mslora_cr.data.tasks import VALIDATION, read_questions

if TYPE_CHECKING:
    from mslora_cr.data.input_processor import InputProcessor


Names = dict[str, str]
"""Images by their path below the data set's folder, with the name that the annotations give."""
COMMONEST = 10
"""The report counts this many answers."""
ONE_SIDED = 0.95
"""A single answer's share, among closed questions or in training, is remarked on from this value on."""
SHORT = 80
"""A training answer of up to this many characters is taken for a choice, as a closed question has."""
NOTABLE = 0.01
"""A training answer is named from this share on."""
CONVERTIBLE = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
"""A table of questions may have these file endings."""
OUR_FILES = ("train.json", "test.jsonl", VALIDATION, "convert.json")


@dataclass(frozen=True)
class OwnDataSet:
    """Location of a configuration's data set; `test_rows` only for a published one."""

    name: str
    folder: str
    image_folders: tuple[str, ...]
    test_rows: TestRows | None = None
    train: str = "train.json"
    test: str = "test.jsonl"
    benchmark: Benchmark | None = None
    references: str | None = None


@dataclass(frozen=True)
class Scan:
    """How image files are checked; a `cache` file remembers those found good (`check_images`)."""

    workers: int = 1
    progress: bool = False
    cache: Path | None = None


def check(
    dataset: DataSet | OwnDataSet, root: Path, processor: InputProcessor | None = None, scan: Scan | None = None
) -> Report:
    """Check one data set below the data root.

    Args:
        dataset: The data set, from the catalogue or a configuration.
        root: The data root.
        processor: Measures lengths, if given.
        scan: How image files are checked, if they are.
    """
    report = Report(dataset.name)
    folder = root / dataset.folder
    if not folder.is_dir():
        report.error(f"{folder}: no such folder{missing_annotations(folder / 'train.json')}")
        return report
    files = dataset if isinstance(dataset, OwnDataSet) else OwnDataSet(dataset.name, dataset.folder, ())
    references = folder / files.references if files.references else None
    read_test = partial(_read_test, benchmark=files.benchmark, references=references)
    training = _opened(TrainingRecords, folder / files.train, report)
    test = _opened(read_test, folder / files.test, report)
    given = (folder / VALIDATION).exists()
    validation = _opened(TestRecords, folder / VALIDATION, report) if given else None
    train_images = _check_training(training, dataset, report) if training else {}
    test_images = _check_test(test, dataset, report) if test else {}
    validation_images = _check_validation(validation, dataset, report) if validation else {}
    if processor is not None:
        roots = image_roots(root, dataset.folder, dataset.image_folders)
        report.truncated = check_lengths(training, roots, processor, report) if training else 0
        report.truncated += check_prompt_lengths(test, roots, processor, report) if test else 0
        report.truncated += check_prompt_lengths(validation, roots, processor, report) if validation else 0
    if training:
        check_questions(training_questions(training), "training", report)
    if test:
        check_questions(test_questions(test), "test", report)
    if training and test:
        report.shared_images = _check_overlap(train_images, test_images, ("training", "test"), report)
    for other, images, what in ((training, train_images, "training"), (test, test_images, "test")):
        if validation and other:
            sides = (what, "validation")
            _check_overlap(images, validation_images, sides, report)
            _check_patients(shared_patients(other, validation), sides, report)
    copies: set[str] = set()
    if scan is not None:
        copies = _check_image_files(dataset, root, train_images, test_images, validation_images, scan, report)
    if training and test:
        report.card = data_card(folder, dataset.name, training, test)
        _remember_leaks(
            folder, training, test, {test_images[name] for name in train_images.keys() & test_images} | copies, report
        )
    return report


def _remember_leaks(
    folder: Path, training: TrainingRecords, test: TestRecords, names: set[str], report: Report
) -> None:
    """Report on patients in both files, and keep what the files share beside the data."""
    patients = shared_patients(training, test)
    _check_patients(patients, ("training", "test"), report)
    leaks = Leaks(
        train=training.digest,
        test=test.digest,
        images=report.shared_images or 0,
        contents=report.shared_contents,
        patients=len(patients),
        questions=questions_about(test, names, patients) if names or patients else 0,
        test_questions=len(test),
    )
    remember(folder, leaks)


File = TypeVar("File", TrainingRecords, TestRecords)


def _read_test(path: Path, problems: list[str], benchmark: Benchmark | None, references: Path | None) -> TestRecords:
    return read_questions(path, benchmark, references, problems)


def _opened(kind: Callable[[Path, list[str]], File], path: Path, report: Report) -> File | None:
    """Return the file's good records; every malformed one is reported."""
    problems: list[str] = []
    try:
        records = kind(path, problems)
    except DataError as error:
        report.error(str(error) + _advice(path))
        return None
    finally:
        if problems:
            messages = [problem.removeprefix(f"{path.parent}/") for problem in problems]
            report.problems.append(Problem("error", f"{path.name}: malformed records", len(messages), messages))
    return records if len(records) else None


def _advice(path: Path) -> str:
    """Return advice for a missing file into which other files in its folder could be converted."""
    tables = sorted(file for file in path.parent.glob("*") if file.suffix in CONVERTIBLE)
    others = [] if path.exists() else [file.name for file in tables if file.name not in OUR_FILES]
    return f"; `mslora-cr data convert {path.parent / others[0]} --output FOLDER` may make it" if others else ""


def _check_training(records: TrainingRecords, dataset: DataSet | OwnDataSet, report: Report) -> Names:
    """Report on the conversations, and return the images that they name."""
    empty, nul = [], []
    names: set[str] = set()
    answers: Counter[str] = Counter()
    all_answers = 0
    for index, record in enumerate(records):
        location = f"{records.path.name}: {records.location(index)}"
        names.update(record.images)
        said = [turn.text.strip().lower() for turn in record.turns if turn.speaker == "gpt"]
        answers.update(answer for answer in said if 0 < len(answer) <= SHORT)
        all_answers += len(said)
        if "" in said:
            empty.append(location)
        if any("\0" in turn.text for turn in record.turns):
            nul.append(location)
    report.train_rows = len(records)
    if nul:
        report.error("conversations with a NUL character, which cannot be encoded", nul)
    if empty:
        report.warning("conversations with an empty answer", empty)
    commonest = {answer: Share(count, count / all_answers) for answer, count in answers.most_common(COMMONEST)}
    report.training_answers = {answer: count for answer, count in commonest.items() if count.share >= NOTABLE}
    _check_balance(answers, all_answers, "training answers are the same", report)
    return _images(names, dataset, records.path.name, report)


def _check_test(records: TestRecords, dataset: DataSet | OwnDataSet, report: Report) -> Names:
    """Report on the questions, and return the images that they name."""
    asked = look_at_questions(records)
    report.test_open, report.test_closed = asked.types["OPEN"], asked.types["CLOSED"]
    answers = asked.closed_answers
    report.closed_answers = dict(answers.most_common(COMMONEST))
    expected = dataset.test_rows
    if expected is not None and (report.test_open, report.test_closed) != (expected.open, expected.closed):
        report.warning(
            f"the published test set holds {expected.open} open and {expected.closed} closed rows, this one "
            f"{report.test_open} and {report.test_closed}: scores cannot be compared with the published ones"
        )
    asked.report_faults(report)
    repeated = [f"{identifier!r}, {count} times" for identifier, count in asked.ids.items() if count > 1]
    if repeated:
        report.warning("question ids that repeat: their rows are scored one by one, in order", repeated)
    _check_balance(answers, answers.total(), "closed test questions have the same answer", report)
    return _images(asked.images, dataset, records.path.name, report)


def _check_validation(records: TestRecords, dataset: DataSet | OwnDataSet, report: Report) -> Names:
    """Report on the validation questions, and return the images that they name."""
    asked = look_at_questions(records)
    report.validation_rows = len(records)
    asked.report_faults(report)
    check_questions(test_questions(records), "validation", report)
    return _images(asked.images, dataset, records.path.name, report)


def _check_balance(answers: Counter[str], total: int, what: str, report: Report) -> None:
    for answer, count in answers.most_common(1):
        if count / total >= ONE_SIDED:
            report.warning(f"{count / total:.0%} of the {what}, {answer!r}")


def _images(names: Iterable[str], dataset: DataSet | OwnDataSet, file: str, report: Report) -> Names:
    """Return the images named in a file, each by its path below the data set's folder; unsafe names are reported."""
    images, unsafe = {}, []
    for name in names:
        try:
            path = check_name(name)
        except DataError as error:
            unsafe.append(str(error))
            continue
        from_root = path.parts[0] == dataset.folder
        images[str(path.relative_to(dataset.folder) if from_root else path)] = name
    if unsafe:
        report.error(f"{file}: image names that lead outside the data root", sorted(unsafe))
    return images


def _check_overlap(one: Names, other: Names, sides: tuple[str, str], report: Report) -> int:
    """Report on images that two files name, and return their number."""
    shared = sorted(one.keys() & other.keys())
    if shared:
        report.warning(f"images in both the {sides[0]} and the {sides[1]} file", shared)
    return len(shared)


def _check_patients(shared: set[str], sides: tuple[str, str], report: Report) -> None:
    if shared:
        report.warning(f"patients in both the {sides[0]} and the {sides[1]} file", sorted(shared))


def _check_image_files(
    dataset: DataSet | OwnDataSet,
    root: Path,
    training: Names,
    test: Names,
    validation: Names,
    scan: Scan,
    report: Report,
) -> set[str]:
    """Report on the files, and return the test images, as the file names them, that are copies of training images."""
    for name in dataset.image_folders:
        if not (root / dataset.folder / name).is_dir():
            report.error(f"{root / dataset.folder / name}: no such folder")
    roots = image_roots(root, dataset.folder, dataset.image_folders)
    train_files = _resolve(training, roots, "train.json", report)
    test_files = _resolve(test, roots, "test.jsonl", report)
    validation_paths = set(_resolve(validation, roots, VALIDATION, report).values())
    train_paths, test_paths = set(train_files.values()), set(test_files.values())
    paths = sorted(train_paths | test_paths | validation_paths)
    report.images = len(paths)

    bad, lossy = inspect_images(paths, scan.workers, scan.progress, scan.cache)
    report.unreadable = len(bad)
    if bad:
        report.error("unreadable images", [f"{path}: {problem}" for path, problem in bad])

    if lossy:
        report.warning(
            "images of which the model sees little, or sees otherwise than a viewer shows them: they are decoded as in "
            "the published code, which takes the first page, ignores EXIF orientation and saturates what has more than "
            "8 bits; `mslora-cr data convert` writes them as a viewer shows them",
            [f"{path}: {loss}" for path, loss in lossy],
        )

    renamed = [str(path) for image, path in test_files.items() if image not in training and path in train_paths]
    copies = sorted({*renamed, *_copies(train_paths, test_paths, scan)})
    report.shared_contents = len(copies)
    if copies:
        report.warning("test images that are, under another name, also training images", copies)
    for side, side_paths in (("training", train_paths), ("test", test_paths)):
        if copied := _copies(side_paths, validation_paths, scan):
            report.warning(f"validation images that are, under another name, also {side} images", copied)
    return {test[name] for name, path in test_files.items() if str(path) in {*copies}}


def _resolve(names: Names, roots: Sequence[Path], file: str, report: Report) -> dict[str, Path]:
    """Return the existing images, by their paths."""
    paths, missing = {}, []
    for location, name in names.items():
        try:
            paths[location] = resolve_image(name, roots)
        except DataError:
            missing.append(name)
    report.missing = (report.missing or 0) + len(missing)
    if missing:
        report.error(f"{file}: images that are missing below {roots[0]}", sorted(missing))
    return paths


def _copies(train: set[Path], test: set[Path], scan: Scan) -> list[str]:
    """Return test images with the bytes of a training image of another name. Only files of equal size are read."""
    sizes = [{path.stat().st_size for path in paths} for paths in (train, test)]
    common = sizes[0] & sizes[1]
    candidates = [
        sorted(path for path in paths - others if path.stat().st_size in common)
        for paths, others in ((train, test), (test, train))
    ]
    with tqdm(total=sum(map(len, candidates)), desc="contents", unit="image", disable=not scan.progress) as bar:
        digests = {digest for _, digest in _digests(candidates[0], scan.workers, bar)}
        return [str(path) for path, digest in _digests(candidates[1], scan.workers, bar) if digest in digests]


def _digests(paths: Sequence[Path], workers: int, bar: tqdm) -> Iterator[tuple[Path, bytes]]:
    remaining = iter(paths)
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(remaining, 1024)):
            for path, digest in zip(chunk, pool.map(_digest, chunk), strict=True):
                bar.update()
                yield path, digest


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()[:16]
