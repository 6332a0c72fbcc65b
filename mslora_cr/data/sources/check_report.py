"""The result of a data check: counts and problems of each data set, and a table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

EXAMPLES = 5
"""This many instances of a problem are named."""
MOST_LISTED = 50
"""The console lists this many malformed records; the JSON file has all."""


@dataclass
class Problem:
    level: Literal["error", "warning"]
    message: str
    count: int
    examples: list[str]


@dataclass
class Share:
    count: int
    share: float


@dataclass
class DataCard:
    """What a reader of scores asks about a data set.

    Attributes:
        unit: What the files name as patients: patients, lesions or images.
        train_patients: Number of units that the training file names.
        test_patients: Number of units that the test file names.
        test_without_patient: Number of test questions that name no unit: their images count as independent of all
            others.
        attributes: Attributes of the test questions: by name the commonest values (for many numbers their least and
            largest), and how many questions have each.
        source: Where the images come from.
        licence: The licence as the catalogue states it.
        shows: What the closed test questions can show; empty where there are none.
    """

    unit: str = "patient"
    train_patients: int = 0
    test_patients: int = 0
    test_without_patient: int = 0
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    source: str = "not known"
    licence: str = "not known"
    made: str = "not known"
    shows: str = ""

    def in_words(self) -> str:
        """Return the card as one line."""
        trained, tested = (
            f"{count:,}" if count else "not named" for count in (self.train_patients, self.test_patients)
        )
        facts = [f"{self.unit}s: {trained} in training, {tested} in testing"]
        if self.test_without_patient:
            facts.append(f"{self.test_without_patient:,} test questions name no {self.unit}")
        for name, values in self.attributes.items():
            facts.append(f"{name}: {', '.join(f'{value} {count:,}' for value, count in values.items())}")
        facts += [f"source: {self.source}", f"licence: {self.licence}", f"questions: {self.made}"]
        return "; ".join([*facts, *([f"shows: {self.shows}"] if self.shows else [])])


@dataclass
class Report:
    """The result of checking one data set; `None` where nothing could be checked."""

    name: str
    train_rows: int | None = None
    validation_rows: int | None = None
    """Number of questions in `val.jsonl`, where there is one."""
    test_open: int | None = None
    test_closed: int | None = None
    images: int | None = None
    missing: int | None = None
    unreadable: int | None = None
    shared_images: int | None = None
    """Images that both the training and the test file name."""
    shared_contents: int | None = None
    """Test images that are also training images under another name: the same file, or one with the same bytes."""
    closed_answers: dict[str, int] = field(default_factory=dict)
    """The commonest answers to the closed test questions, in lower case."""
    training_answers: dict[str, Share] = field(default_factory=dict)
    """The commonest short answers in training, in lower case, with their share of all training answers."""
    truncated: int | None = None
    """Training conversations and test prompts longer than the model's limit."""
    problems: list[Problem] = field(default_factory=list)
    card: DataCard | None = None
    """None where a file could not be read."""

    @property
    def errors(self) -> int:
        return sum(problem.level == "error" for problem in self.problems)

    def error(self, message: str, examples: Sequence[str] = ()) -> None:
        self.problems.append(Problem("error", message, len(examples) or 1, list(examples[:EXAMPLES])))

    def warning(self, message: str, examples: Sequence[str] = ()) -> None:
        self.problems.append(Problem("warning", message, len(examples) or 1, list(examples[:EXAMPLES])))


COLUMNS = (
    *("train_rows", "validation_rows", "test_open", "test_closed", "images", "missing", "unreadable"),
    *("shared_images", "shared_contents", "truncated"),
)


def table(reports: Iterable[Report]) -> str:
    """Return a line for each data set, followed by the shares of the answers, the data cards and the problems."""
    rows = [["data set", *(name.replace("_", " ") for name in COLUMNS), "verdict"]]
    problems, balance, cards = [], [], []
    for report in reports:
        if report.test_closed:
            shares = (f"{answer} {count / report.test_closed:.0%}" for answer, count in report.closed_answers.items())
            balance.append(f"closed answers: {report.name}: {', '.join(shares)}")
        if report.training_answers:
            shares = (f"{answer} {share.share:.0%}" for answer, share in report.training_answers.items())
            balance.append(f"training answers: {report.name}: {', '.join(shares)}")
        if report.card:
            cards.append(f"data card: {report.name}: {report.card.in_words()}")
        values = [getattr(report, name) for name in COLUMNS]
        verdict = "errors" if report.errors else "warnings" if report.problems else "ok"
        rows.append([report.name, *("-" if value is None else f"{value:,}" for value in values), verdict])
        for problem in report.problems:
            count = f" ({problem.count:,})" if problem.examples else ""
            problems.append(f"{problem.level}: {report.name}: {problem.message}{count}")
            problems += [f"    {example}" for example in problem.examples[:MOST_LISTED]]
            hidden = len(problem.examples) - MOST_LISTED
            problems += [f"    … and {hidden:,} more, all in the JSON file"] if hidden > 0 else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", *balance, *cards, *problems]).rstrip()
