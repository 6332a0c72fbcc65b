"""Checks single questions: what they are, which are asked twice with other answers or always answered alike, which are
about patients trained on, and which are too long for a base model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mslora_cr.data.advice import says_nothing
from mslora_cr.data.images import MissingImageError
from mslora_cr.data.listed import ListedQuestion
from mslora_cr.data.records import TestRecord, TestRecords, TrainingRecords
from mslora_cr.data.sources.check_report import Report
from mslora_cr.data.validation import question_of

if TYPE_CHECKING:
    from mslora_cr.data.input_processor import InputProcessor

ONE_SIDED = 0.95
FEWEST = 10
"""That a question's answer is always the same is remarked on if the question is asked at least this often."""
MOST_SHOWN = 60


class Asked(NamedTuple):
    """A question with its true answers, in plain form."""

    location: str
    images: tuple[str, ...]
    text: str
    truths: frozenset[str]
    closed: bool


@dataclass
class QuestionCounts:
    """What the questions of a file are, and what is wrong with single ones.

    Attributes:
        types: How many are open and closed.
        closed_answers: True answers to closed questions, in lower case.
        images: Images that they name.
        ids: How often each id occurs.
        empty: Locations of questions whose true answer says nothing.
        nul: Locations of questions that cannot be encoded.
    """

    types: Counter[str] = field(default_factory=Counter)
    closed_answers: Counter[str] = field(default_factory=Counter)
    images: set[str] = field(default_factory=set)
    ids: Counter[int | str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    nul: list[str] = field(default_factory=list)

    def report_faults(self, report: Report) -> None:
        """Report what no question may contain."""
        if self.nul:
            report.error("questions with a NUL character, which cannot be encoded", self.nul)
        if self.empty:
            report.error(
                "questions whose true answer is empty, or nothing but punctuation and articles: any answer would count "
                "as right; leave them out or give them another truth",
                self.empty,
            )


def look_at_questions(records: TestRecords) -> QuestionCounts:
    """Count the questions of `test.jsonl` or `val.jsonl`."""
    seen = QuestionCounts()
    for index, record in enumerate(records):
        location = f"{records.path.name}: question {index}"
        seen.ids[record.question_id] += 1
        seen.images.update(record.images)
        seen.types[record.answer_type] += 1
        if record.answer_type == "CLOSED":
            seen.closed_answers[record.gt.strip().lower()] += 1
        if says_nothing(record.gt) and not (_scored_by_a_benchmark(record) and record.gt.strip()):
            seen.empty.append(f"{location} (id {record.question_id}): {record.gt!r}")
        if "\0" in record.text:
            seen.nul.append(location)
    return seen


def _scored_by_a_benchmark(record: TestRecord) -> bool:
    """Return whether a benchmark's scorer scores the question. Such a scorer takes a truth such as the letter `A` as it
    is."""
    return isinstance(record, ListedQuestion) and record.benchmark is not None


def plain(text: str) -> str:
    """Return a text without case and extra spaces."""
    return " ".join(text.casefold().split())


def test_questions(records: TestRecords) -> Iterator[Asked]:
    """Yield the questions of a test file."""
    for index, record in enumerate(records):
        truths = frozenset(map(plain, record.truths))
        location = f"{records.path.name}: question {index}"
        yield Asked(location, record.images, plain(record.question), truths, record.answer_type == "CLOSED")


def training_questions(records: TrainingRecords) -> Iterator[Asked]:
    """Yield the first questions of a training file."""
    for index, record in enumerate(records):
        if question := question_of(record):
            truths, closed = frozenset([plain(question.gt)]), question.answer_type == "CLOSED"
            yield Asked(
                f"{records.path.name}: {records.location(index)}", record.images, plain(question.text), truths, closed
            )


def check_questions(questions: Iterable[Asked], what: str, report: Report) -> None:
    """Warn of questions about the same images whose true answers have nothing in common, and of questions that are
    always answered alike.

    Args:
        what: `training`, `validation` or `test`.
        report: Receives the warnings.
    """
    first: dict[int, tuple[frozenset[int], str, str]] = {}  # of long answers only a hash and the beginning
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    contradicting = []
    for asked in questions:
        truths, said = frozenset(map(hash, asked.truths)), " or ".join(sorted(asked.truths))[:MOST_SHOWN]
        earlier, said_first, location = first.setdefault(
            hash((asked.images, asked.text)), (truths, said, asked.location)
        )
        if not truths & earlier:
            said = " and ".join(sorted([said_first, said]))[:MOST_SHOWN]
            contradicting.append(f"{asked.location}, and {location}: {asked.text[:MOST_SHOWN]!r}, {said}")
        if asked.closed:
            answers[asked.text].update(asked.truths)
    if contradicting:
        report.warning(f"{what} questions about the same image with different answers", contradicting)
    one_sided = [
        f"{text[:MOST_SHOWN]!r}: {answer[:MOST_SHOWN]!r}, {count} of {counter.total()} times"
        for text, counter in answers.items()
        for answer, count in counter.most_common(1)
        if counter.total() >= FEWEST and count / counter.total() >= ONE_SIDED
    ]
    if one_sided and len(answers) > 1:  # for a single question, the balance of the whole set tells this
        report.warning(f"closed {what} questions that nearly always have the same answer", one_sided)


def shared_patients(training: TrainingRecords | TestRecords, test: TestRecords) -> set[str]:
    """Return the patients that both files name."""
    trained = {str(record.patient) for record in training if record.patient is not None}
    return trained and trained & {str(record.patient) for record in test if record.patient is not None}


def questions_about(test: TestRecords, images: set[str], patients: set[str]) -> int:
    """Count the test questions that show one of some images, or are about one of some patients."""
    return sum(bool(images & {*record.images} or str(record.patient) in patients) for record in test)


def check_lengths(records: TrainingRecords, roots: Sequence[Path], processor: InputProcessor, report: Report) -> int:
    """Report on what training would learn of some records, and return how many of them are cut."""
    from mslora_cr.data.lengths import LearnedCounts  # This imports transformers.

    counts, refused = LearnedCounts(len(records)), []
    for index, record in enumerate(records):
        if any("\0" in turn.text for turn in record.turns):
            continue
        try:
            counts.add(index, record, processor.count_labels(record, roots), processor.max_length)
        except MissingImageError:  # the check of image files reports it
            continue
        except ValueError as error:
            refused.append(f"{records.path.name}: {records.location(index)}: {error}")

    def places(indices: Sequence[int]) -> list[str]:
        return [f"{records.path.name}: {records.location(index)}" for index in indices]

    if refused:
        report.error("conversations that cannot be encoded", refused)
    if counts.unlabelled:
        report.warning(
            "conversations that the template cannot hold: they add nothing to the loss", places(counts.unlabelled)
        )
    if counts.lost:
        report.warning(
            f"conversations that lose their whole answer, which begins behind {processor.max_length} positions",
            places(counts.lost),
        )
    if not counts.learned:
        report.error(f"{records.path.name}: no conversation has an answer to learn, so training would learn nothing")
    _report_long(places(counts.cut), processor.max_length, report)
    return len(counts.cut) + len(counts.lost)


def check_prompt_lengths(records: TestRecords, roots: Sequence[Path], processor: InputProcessor, report: Report) -> int:
    """Report on questions that are too long, and return their number."""
    long, refused = [], []
    for index, record in enumerate(records):
        location = f"{records.path.name}: question {index}"
        if "\0" in record.text:
            continue
        try:
            long += [location] if processor.prompt_length(record, roots) > processor.max_length else []
        except MissingImageError:
            continue
        except ValueError as error:
            refused.append(f"{location}: {error}")
    if refused:
        report.error("questions that cannot be encoded", refused)
    _report_long(long, processor.max_length, report)
    return len(long)


def _report_long(locations: list[str], max_length: int, report: Report) -> None:
    if locations:
        report.warning(f"samples longer than {max_length} positions: their end is cut off", locations)
