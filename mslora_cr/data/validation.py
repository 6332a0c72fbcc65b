"""Validation records: a data set's `val.jsonl`, or a share of its training records where it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.grouping import connected, drawn_groups
from mslora_cr.data.records import (
    IMAGE,
    TestRecord,
    TestRecords,
    TrainingRecord,
    TrainingRecords,
    sample_of,
)

YES_NO = frozenset({"yes", "no"})
Seen = TypeVar("Seen", TrainingRecord, TestRecord)


class RecordView(Sequence[Seen], Generic[Seen]):
    """Some records of a file, each converted to another kind when it is read."""

    def __init__(
        self, records: TrainingRecords | TestRecords, indices: Sequence[int], convert: Callable[[Any], Seen]
    ) -> None:
        """
        Args:
            indices: Those to show, in order.
            convert: Converts a record of the file.
        """
        self.path = records.path
        self._records, self._indices = records, indices
        self._convert: Callable[[Any], Seen] = convert

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Seen: ...
    @overload
    def __getitem__(self, index: slice) -> list[Seen]: ...
    def __getitem__(self, index: int | slice) -> Seen | list[Seen]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        return self._convert(self._records[self._indices[index]])

    def __iter__(self) -> Iterator[Seen]:
        return (self[index] for index in range(len(self)))

    def location(self, index: int) -> str:
        """Say where a record is in the file, in words."""
        return self._records.location(self._indices[index])


@dataclass(frozen=True)
class ValidationRecords:
    """The validation records of a task, at most as many as are measured, as training and as evaluation read them.

    Attributes:
        conversations: For the loss.
        questions: For the scores.
        digest: Digest of the file and of the choice of records.
        available: The number of validation records that the task has.
    """

    conversations: RecordView[TrainingRecord]
    questions: RecordView[TestRecord]
    digest: str
    available: int

    @classmethod
    def of_file(cls, records: TestRecords, most: int) -> ValidationRecords:
        """Return the records of a `val.jsonl`."""
        chosen = sample_of(len(records), most)
        return cls(
            RecordView(records, chosen, conversation_of),
            RecordView(records, chosen, _unchanged),
            records.digest,
            len(records),
        )

    @classmethod
    def held_out_of(cls, records: TrainingRecords, most: int) -> ValidationRecords:
        """Return training records that are held out (`validation_split`)."""
        chosen = sample_of(len(records), most)
        return cls(
            RecordView(records, chosen, _unchanged),
            RecordView(records, chosen, _held_out_question),
            records.digest,
            len(records),
        )


@dataclass(frozen=True)
class ValidationSplit:
    """Training records in two parts without a common patient or image.

    Attributes:
        training: Indices of the records for training, in order.
        held_out: Indices of the others, in order.
        questions: The first question of each held-out record, in the form of `test.jsonl`.
    """

    training: list[int]
    held_out: list[int]
    questions: list[TestRecord]


def validation_split(records: TrainingRecords, share: float, seed: int) -> ValidationSplit:
    """Take a share of the records with images, by whole patients or, if none is known, by images.

    The parts depend only on the records, the share and the seed: they are the same for every method, on every rank and
    in every launch. Common answers have the same share in both, as nearly as whole patients allow. Records without an
    image stay in training.

    Args:
        share: The share of the records, in (0, 1).
        seed: Draws the parts.

    Raises:
        ValueError: The share is not such a number.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of {share} for validation is not between 0 and 1")
    indices, keys, answers = [], [], []
    for index, record in enumerate(records):
        if record.images and question_of(record):
            patient = [] if record.patient is None else [f"patient {record.patient}"]
            indices.append(index)
            keys.append([*patient, *(f"image {name}" for name in record.images)])
            answers.append(
                final_answer(next(turn.text for turn in record.turns if turn.speaker == "gpt")).text.strip().lower()
            )
    groups = connected(keys)
    drawn = drawn_groups(groups, answers, share, seed)
    held_out = [index for index, group in zip(indices, groups, strict=True) if group in drawn]
    chosen = set(held_out)
    questions = [question for index in held_out if (question := question_of(records[index]))]
    return ValidationSplit([index for index in range(len(records)) if index not in chosen], held_out, questions)


def question_of(record: TrainingRecord) -> TestRecord | None:
    """Return the first question of a conversation in the form of `test.jsonl`; None if it has no image or no answer."""
    first = 0 if record.turns[0].speaker == "human" else 1
    said = record.turns[first : first + 2]
    if not record.images or [turn.speaker for turn in said] != ["human", "gpt"]:
        return None
    answer = said[1].text.strip()
    return TestRecord(
        question_id=record.id,
        image=record.images,
        text=said[0].text.replace(IMAGE, "").strip(),
        gt=(answer,),
        answer_type="CLOSED" if final_answer(answer).text.strip(" .").lower() in YES_NO else "OPEN",
        patient=record.patient,
        attributes=record.attributes,
    )


def conversation_of(record: TestRecord) -> TrainingRecord:
    """Return a question with its true answer, in the form of `train.json`."""
    asked = {"from": "human", "value": f"{IMAGE}\n{record.question}"}
    return TrainingRecord.model_validate(
        {
            "id": record.question_id,
            "image": record.images,
            "conversations": [asked, {"from": "gpt", "value": record.gt}],
            "patient": record.patient,
            "attributes": record.attributes,
        }
    )


def _held_out_question(record: TrainingRecord) -> TestRecord:
    question = question_of(record)
    assert question is not None, "a record without a question is never held out"
    return question


def _unchanged(record: Seen) -> Seen:
    return record
