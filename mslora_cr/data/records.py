"""The records of a task: `train.json` (a list) and `test.jsonl` (lines), validated once and read lazily.

Opening a file reads it once, in bounded memory: every record is validated, the file is hashed, and only the byte range
of each record is kept. A record is decoded again when it is needed. So the object takes a few megabytes for hundreds
of thousands of records and is cheap to send to data loader workers.
"""

import codecs
import copy
import hashlib
import random
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Generic, Literal, Self, TypeVar, overload

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mslora_cr.data.advice import missing_annotations, other_record
from mslora_cr.data.answers.boxes import Boxed
from mslora_cr.data.answers.options import letter_of, with_options
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.json_list import MAX_RECORD_BYTES, TOO_LONG, Item, ListReader
from mslora_cr.data.record_fields import Attributes, Identifier, Images, Options, Text, Truths
from mslora_cr.utils.errors import DataError, first_problem, problems_in, shorten
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import STRICT_JSON, explain_json

AnswerType = Literal["OPEN", "CLOSED"]
AnswerKind = Literal["choice", "number", "set", "text"]
"""The kind of an answer: one of a few choices, a count or a measurement, several labels in any order, or free text."""

IMAGE = "<image>"
"""The marker that represents a record's images in a text."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Turns = Annotated[tuple["Turn", ...], BeforeValidator(_as_tuple)]


class _Record(BaseModel):
    # Unknown fields are ignored: published annotation files carry some of their own.
    model_config = ConfigDict(frozen=True, strict=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _no_name_is_misspelt(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and (mistaken := _misspelt(cls, tuple(value))):
            raise ValueError("field {!r} is not known; did you mean {!r}?".format(*mistaken))
        return value


@lru_cache(1024)
def _misspelt(model: type[BaseModel], names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the first name that resembles that of an absent field, with the field's name; None without any."""
    valid = {name for key, field in model.model_fields.items() for name in (key, field.alias or key)}
    absent = [field.alias or key for key, field in model.model_fields.items() if not {key, field.alias} & {*names}]
    for name in names:
        if name not in valid and (close := get_close_matches(name, absent, n=1, cutoff=0.85)):
            return name, close[0]
    return None


class Turn(_Record):
    """One message of a conversation."""

    speaker: Literal["human", "gpt"] = Field(alias="from")
    text: Text = Field(alias="value")


class TrainingRecord(_Record, Boxed):
    """One conversation of `train.json`; `images` is empty for a text-only record."""

    id: Identifier
    images: Images = Field(default=(), alias="image")
    turns: Turns = Field(alias="conversations", min_length=1)
    patient: Identifier | None = None
    """The patient whose images these are. A share for validation takes whole patients."""
    attributes: Attributes = {}


class TestRecord(_Record, Boxed):
    """One question of `test.jsonl` or `val.jsonl`. Question ids need not be unique: published files repeat some."""

    __test__: ClassVar[bool] = False  # pytest: not a test class

    question_id: Identifier
    images: Images = Field(alias="image", min_length=1)
    text: Text
    truths: Truths = Field(alias="gt", min_length=1)
    """Every accepted answer; the best of them counts. Annotators' answers may repeat, as VQA's ten do."""
    answer_type: AnswerType
    patient: Identifier | None = None
    """The patient whose images these are. Questions about one patient are not independent; intervals and tests respect
    that."""
    attributes: Attributes = {}
    """Attributes of patient and picture by name, such as `{"sex": "F", "age": 63}`. Scores are given by group."""
    options: Options = {}
    """The answers that the question offers, in order, by capital letter; empty where it offers none."""
    answer_kind: AnswerKind | None = None
    """None if the record does not say."""

    @property
    def gt(self) -> str:
        """The true answer, or the commonest of several (the first of equally common ones)."""
        return Counter(self.truths).most_common(1)[0][0]

    @property
    def question(self) -> str:
        """The question as the model reads it: the text, followed by the options if there are any."""
        return with_options(self.text, self.options)

    @model_validator(mode="after")
    def _truth_is_offered(self) -> Self:
        chosen = (letter_of(final_answer(truth).text, self.options) for truth in self.truths)
        if self.options and self.answer_kind != "set" and not any(chosen):
            offered = ", ".join(f"{letter}. {text}" for letter, text in self.options.items())
            raise ValueError(f"field 'gt': {shorten(self.gt)} is none of the options ({offered})")
        return self


Record = TypeVar("Record", bound=_Record)


def shown_images(record: TrainingRecord | TestRecord, all_images: bool) -> tuple[str, ...]:
    """Return the images of a record that are shown: the first one, as published, or all of them."""
    return record.images if all_images else record.images[:1]


class _Records(Sequence[Record], Generic[Record]):
    """The code that both kinds of files share.

    Attributes:
        file_digest: SHA-256 of its bytes, in hexadecimal.
        digest: The same for a whole file. For some of its records (`only`), it also depends on which they are.

    Args:
        problems: Collects the problems of single records, which are then skipped; without it, the first problem raises.

    Raises:
        DataError: The file is missing, empty, not UTF-8, not JSON of this form, or a record is malformed.
    """

    _model: type[Record]
    _change: Callable[[Record], Record] | None = None

    def __init__(self, path: Path | str, problems: list[str] | None = None):
        self.path = Path(path)
        self._problems = problems
        self._starts, self._ends = array("Q"), array("Q")
        self._numbers: Sequence[int] | None = None
        hasher = hashlib.sha256()
        try:
            with check_regular(self.path).open("rb") as file:
                for start, end, location, value in self._items(file, hasher):
                    try:
                        self._check(value, location, start)
                    except DataError as error:
                        self._note(error)
                        continue
                    self._starts.append(start)
                    self._ends.append(end)
        except OSError as error:
            advice = missing_annotations(self.path) if isinstance(error, FileNotFoundError) else ""
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error}){advice}") from error
        self.digest = self.file_digest = hasher.hexdigest()
        if not self._starts and not problems:
            raise DataError(f"{self.path}: contains no records")

    @abstractmethod
    def _items(self, file: BinaryIO, hasher: "hashlib._Hash") -> Iterator[Item]: ...

    @abstractmethod
    def location(self, index: int) -> str:
        """Describe where a record is in the file, for messages."""

    def _note(self, problem: DataError) -> None:
        if self._problems is None:
            raise problem
        self._problems.append(str(problem))

    def _check(self, value: Any, location: str, start: int) -> Record:
        if not isinstance(value, dict):
            raise DataError(f"{self.path}: {location}: expected an object ({{…}}), found {shorten(value)}")
        try:
            return self._record(value, start)
        except ValidationError as error:
            problem = first_problem(error) if self._problems is None else "; ".join(problems_in(error))
            raise DataError(f"{self.path}: {location}: {problem}{other_record(value)}") from None

    def _record(self, value: Any, start: int) -> Record:  # start: the first byte in the file
        return self._model.model_validate(value)

    def _read(self, file: BinaryIO, index: int) -> Record:
        file.seek(self._starts[index])
        data = file.read(self._ends[index] - self._starts[index])
        try:
            record = self._record(STRICT_JSON.decode(data.decode()), self._starts[index])
            return record if self._change is None else self._change(record)
        except ValueError as error:  # It was valid when the file was opened.
            problem = "the file changed since it was opened"
            raise DataError(f"{self.path}: {self.location(index)}: {problem}") from error

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        with self.path.open("rb") as file:
            if isinstance(index, slice):
                return [self._read(file, i) for i in range(len(self))[index]]
            return self._read(file, range(len(self))[index])

    def sizes(self) -> list[int]:
        """Return the size of each record in the file, in bytes."""
        return [end - start for start, end in zip(self._starts, self._ends, strict=True)]

    def thinned(self, most: int) -> Self:
        """Return at most this many of the records, as `sample_of` chooses them."""
        return self.only(sample_of(len(self), most))

    def changed(self, change: Callable[[Record], Record]) -> Self:
        """Return the records with a function applied to each."""
        some = copy.copy(self)
        some._change = change
        return some

    def only(self, indices: Sequence[int]) -> Self:
        """Return the records at these places, in this order. Their `digest` depends on the file and the places."""
        some = copy.copy(self)
        some._starts, some._ends = (array("Q", [ends[i] for i in indices]) for ends in (self._starts, self._ends))
        some._numbers = [self._number(index) for index in indices]
        some.digest = hashlib.sha256(f"{self.digest} {some._numbers}".encode()).hexdigest()
        return some

    def _number(self, index: int) -> int:
        """Return a record's place in the file."""
        return index if self._numbers is None else self._numbers[index]

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            for index in range(len(self)):
                yield self._read(file, index)


def sample_of(count: int, most: int) -> list[int]:
    """Return the places, in order, of at most this many of `count` records: a random sample, the same at every call.

    Taking every n-th record would choose questions of one kind where two kinds alternate in a file.
    """
    return sorted(random.Random(0).sample(range(count), min(count, most)))


class TrainingRecords(_Records[TrainingRecord]):
    """`train.json`: one JSON list of conversations."""

    _model = TrainingRecord

    def _items(self, file: BinaryIO, hasher: "hashlib._Hash") -> Iterator[Item]:
        return ListReader(self.path, file, hasher).items()

    def _check(self, value: Any, location: str, start: int) -> TrainingRecord:
        record = super()._check(value, location, start)
        if problem := _misplaced_mark(record):
            raise DataError(f"{self.path}: {location}: {problem}")
        return record

    def location(self, index: int) -> str:
        return f"record {self._number(index)}"


def _misplaced_mark(record: TrainingRecord) -> str | None:
    """Describe a marker outside the first question, which would need more images than the record shows; None without
    any."""
    question = 0 if record.turns[0].speaker == "human" else 1  # An answer at the start is dropped.
    for number, turn in enumerate(record.turns):
        legal = number == question and turn.speaker == "human" and record.images
        if IMAGE in turn.text and not legal:
            reason = "only the first question may contain one" if record.images else "the record names no image"
            return f"field 'conversations[{number}].value': contains an {IMAGE} marker, but {reason}"
    return None


class TestRecords(_Records[TestRecord]):
    """`test.jsonl`: one JSON object a line; blank lines are skipped."""

    __test__ = False
    _model = TestRecord

    def _items(self, file: BinaryIO, hasher: "hashlib._Hash") -> Iterator[Item]:
        start, number = 0, 0
        while line := file.readline(MAX_RECORD_BYTES):
            hasher.update(line)
            number += 1
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{self.path}: line {number}: {TOO_LONG}")
            location, end = f"line {number}", start + len(line)
            if start == 0 and line.startswith(codecs.BOM_UTF8):  # Programs on Windows put one before UTF-8.
                start, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    value = self._decode(line, location)
                except DataError as error:
                    self._note(error)
                else:
                    yield start, end, location, value
            start = end

    def _decode(self, line: bytes, location: str) -> Any:
        if line.lstrip().startswith(b"["):
            raise DataError(
                f"{self.path}: {location}: expected an object ({{…}}) on each line, found the start of a list"
            )
        try:
            return STRICT_JSON.decode(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: {location}: {explain_json(error)}") from None

    def location(self, index: int) -> str:
        with self.path.open("rb") as file:
            before = file.read(self._starts[index])
        return f"line {before.count(10) + 1}"  # 10: the newline byte
