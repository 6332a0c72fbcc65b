"""The records of a task: `train.json` (a list) and `test.jsonl` (lines), validated once and read lazily.

Opening a file walks it once, in bounded memory: every record is validated, the file is hashed, and only the
byte range of each record is kept. A record is decoded again when it is asked for, so the object is a few
megabytes for hundreds of thousands of records and cheap to send to data loader workers.
"""

import codecs
import copy
import hashlib
import json
import random
import re
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Generic, Literal, NoReturn, Self, TypeVar, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from mslora_cr.data.advice import missing_annotations, other_record
from mslora_cr.utils.errors import DataError, first_problem, problems_in, shorten
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import STRICT_JSON, explain_json

AnswerType = Literal["OPEN", "CLOSED"]

CHUNK_BYTES = 1 << 20
IMAGE = "<image>"
"""The marker that represents a record's images in a text."""
_BLANKS = re.compile(r"[ \t\r\n]*")
TOO_LONG = "a record of more than 16 MB"
MAX_RECORD_BYTES = 16 << 20  # no conversation comes near this; it bounds what a damaged file can make us read


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair (`"\\ud83d"`), which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("should be text, but contains half of a surrogate pair") from None
    return text


def _identifier(value: Any) -> int | str:
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    raise ValueError("should be a string or an integer of 64 bits")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_names(image: Any) -> Any:
    """`image` is a name, a list of names, or (for text-only training records) absent or null."""
    if image is None:
        return ()
    if isinstance(image, str):
        return (image,)
    if isinstance(image, list | tuple):
        return tuple(image)
    raise ValueError("should be a name or a list of names")


Identifier = Annotated[int | str, PlainValidator(_identifier)]
Text = Annotated[str, AfterValidator(_encodable)]
Turns = Annotated[tuple["Turn", ...], BeforeValidator(_as_tuple)]
Images = Annotated[tuple[Text, ...], BeforeValidator(_as_names)]


class _Record(BaseModel):
    # Unknown fields are ignored: published annotation files carry some of their own.
    model_config = ConfigDict(frozen=True, strict=True, populate_by_name=True)


class Turn(_Record):
    """One message of a conversation."""

    speaker: Literal["human", "gpt"] = Field(alias="from")
    text: Text = Field(alias="value")


class TrainingRecord(_Record):
    """One conversation of `train.json`; `images` is empty for a text-only record."""

    id: Identifier
    images: Images = Field(default=(), alias="image")
    turns: Turns = Field(alias="conversations", min_length=1)


class TestRecord(_Record):
    """One question of `test.jsonl`. Question ids need not be unique: published files repeat some."""

    __test__: ClassVar[bool] = False  # pytest: not a test class

    question_id: Identifier
    images: Images = Field(alias="image", min_length=1)
    text: Text
    gt: Text
    answer_type: AnswerType
    patient: Identifier | None = None
    """Whose images these are: questions about one patient are not independent, which intervals and tests respect."""


Record = TypeVar("Record", bound=_Record)
Item = tuple[int, int, str, Any]  # first byte, byte after the last, place in words, decoded JSON


def shown_images(record: TrainingRecord | TestRecord, all_images: bool) -> tuple[str, ...]:
    """The images of a record that are shown: the first, as published, unless all are asked for."""
    return record.images if all_images else record.images[:1]


class _Records(Sequence[Record], Generic[Record]):
    """What both kinds of file share.

    Attributes:
        path: the file. digest: sha256 of its bytes, in hexadecimal.

    Args:
        problems: collects what is wrong with single records, which are then passed over; without it, the first raises.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not JSON of this form, or a record is malformed.
    """

    _model: type[Record]

    def __init__(self, path: Path | str, problems: list[str] | None = None):
        self.path = Path(path)
        self._problems = problems
        self._starts, self._ends = array("Q"), array("Q")
        hasher = hashlib.sha256()
        try:
            with check_regular(self.path).open("rb") as file:
                for start, end, place, value in self._items(file, hasher):
                    try:
                        self._check(value, place)
                    except DataError as error:
                        self._note(error)
                        continue
                    self._starts.append(start)
                    self._ends.append(end)
        except OSError as error:
            advice = missing_annotations(self.path) if isinstance(error, FileNotFoundError) else ""
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error}){advice}") from error
        self.digest = hasher.hexdigest()
        if not self._starts and not problems:
            raise DataError(f"{self.path}: contains no records")

    @abstractmethod
    def _items(self, file: BinaryIO, hasher: "hashlib._Hash") -> Iterator[Item]: ...

    @abstractmethod
    def place(self, index: int) -> str:
        """Where record `index` is in the file, in words, for messages."""

    def _note(self, problem: DataError) -> None:
        if self._problems is None:
            raise problem
        self._problems.append(str(problem))

    def _check(self, value: Any, place: str) -> Record:
        if not isinstance(value, dict):
            raise DataError(f"{self.path}: {place}: expected an object ({{…}}), found {shorten(value)}")
        try:
            return self._model.model_validate(value)
        except ValidationError as error:
            problem = first_problem(error) if self._problems is None else "; ".join(problems_in(error))
            raise DataError(f"{self.path}: {place}: {problem}{other_record(value)}") from None

    def _read(self, file: BinaryIO, index: int) -> Record:
        file.seek(self._starts[index])
        data = file.read(self._ends[index] - self._starts[index])
        try:
            return self._model.model_validate(STRICT_JSON.decode(data.decode()))
        except ValueError as error:  # it was valid when the file was opened
            problem = "the file changed since it was opened"
            raise DataError(f"{self.path}: {self.place(index)}: {problem}") from error

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
        """By record, its bytes in the file."""
        return [end - start for start, end in zip(self._starts, self._ends, strict=True)]

    def thinned(self, most: int) -> Self:
        """At most this many of the records, as `sample_of` chooses them."""
        chosen, some = sample_of(len(self), most), copy.copy(self)
        some._starts, some._ends = (array("Q", [ends[i] for i in chosen]) for ends in (self._starts, self._ends))
        return some

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            for index in range(len(self)):
                yield self._read(file, index)


def sample_of(count: int, most: int) -> list[int]:
    """Places, in order, of at most this many of `count` records: a random sample, but the same at every call.

    Not every n-th record: where two kinds of question alternate in a file, those would all be of one kind.
    """
    return sorted(random.Random(0).sample(range(count), min(count, most)))


class TrainingRecords(_Records[TrainingRecord]):
    """`train.json`: one JSON list of conversations."""

    _model = TrainingRecord

    def _items(self, file: BinaryIO, hasher: "hashlib._Hash") -> Iterator[Item]:
        return _ListReader(self.path, file, hasher).items()

    def _check(self, value: Any, place: str) -> TrainingRecord:
        record = super()._check(value, place)
        if problem := _misplaced_mark(record):
            raise DataError(f"{self.path}: {place}: {problem}")
        return record

    def place(self, index: int) -> str:
        return f"record {index}"


def _misplaced_mark(record: TrainingRecord) -> str | None:
    """A mark elsewhere than in the first question would ask for more images than the record shows."""
    question = 0 if record.turns[0].speaker == "human" else 1  # an opening answer is dropped
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
            place, end = f"line {number}", start + len(line)
            if start == 0 and line.startswith(codecs.BOM_UTF8):  # programs on Windows put one before UTF-8
                start, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    value = self._decode(line, place)
                except DataError as error:
                    self._note(error)
                else:
                    yield start, end, place, value
            start = end

    def _decode(self, line: bytes, place: str) -> Any:
        if line.lstrip().startswith(b"["):
            raise DataError(f"{self.path}: {place}: expected an object ({{…}}) on each line, found the start of a list")
        try:
            return STRICT_JSON.decode(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: {place}: {explain_json(error)}") from None

    def place(self, index: int) -> str:
        with self.path.open("rb") as file:
            before = file.read(self._starts[index])
        return f"line {before.count(10) + 1}"  # 10: the newline byte


class _ListReader:
    """Walks a JSON list element by element through a window of text, so that no more than one element,
    or one chunk, is held at a time."""

    def __init__(self, path: Path, file: BinaryIO, hasher: "hashlib._Hash"):
        self.path, self.file, self.hasher = path, file, hasher
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position = "", 0  # the window, and where in it we are
        self.offset = 0  # of text[position], in bytes from the start of the file
        self.index = 0
        self.ended = False

    def items(self) -> Iterator[Item]:
        if self._peek() == "\ufeff":  # a byte order mark, which programs on Windows put before UTF-8
            self._advance(1)
        if self._peek() != "[":
            raise DataError(f"{self.path}: expected one list ([…]) of records")
        self._advance(1)
        closed = self._peek() == "]"
        while not closed:
            self._peek()
            start, value = self.offset, self._element()
            yield start, self.offset, f"record {self.index}", value
            separator = self._peek()
            if separator not in (",", "]"):
                self._fail("expected ',' or ']' after it" if separator else "the file ends inside the list")
            closed = separator == "]"
            if not closed:
                self._advance(1)
                self.index += 1
        self._advance(1)
        if self._peek():
            raise DataError(f"{self.path}: unexpected content after the end of the list")

    def _element(self) -> Any:
        if self._peek() != "{":
            self._fail("expected an object ({…})" if self.text else "the file ends inside the list")
        while True:
            try:
                value, end = STRICT_JSON.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                # It may only be that the window ends inside the element: widen it, up to a limit.
                held = len(self.text) - self.position
                if self.ended or not isinstance(error, json.JSONDecodeError):
                    self._fail(explain_json(error))
                if held > MAX_RECORD_BYTES:
                    self._fail(TOO_LONG)
                self._fill(max(held, CHUNK_BYTES))
            else:
                start = self.offset
                self._advance(end - self.position)
                if self.offset - start > MAX_RECORD_BYTES:
                    self._fail(TOO_LONG)
                return value

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            blanks = _BLANKS.match(self.text, self.position)
            assert blanks is not None, "it matches nothing at all, too"
            self._advance(blanks.end() - self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._fill(CHUNK_BYTES)

    def _advance(self, count: int) -> None:
        self.offset += len(self.text[self.position : self.position + count].encode())
        self.position += count

    def _fill(self, size: int) -> None:
        data = self.file.read(size)
        self.hasher.update(data)
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            self._fail(explain_json(error))
        self.text, self.position = self.text[self.position :] + more, 0

    def _fail(self, problem: str) -> NoReturn:
        raise DataError(f"{self.path}: record {self.index}: {problem}")
