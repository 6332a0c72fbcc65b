"""A share of the training records, taken for validation where a data set has no `val.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.grouping import connected, drawn_groups
from mslora_cr.data.records import IMAGE, TestRecord, TrainingRecord, TrainingRecords

YES_NO = frozenset({"yes", "no"})


@dataclass(frozen=True)
class ValidationSplit:
    """Training records in two parts that have no patient and no image in common.

    Attributes:
        training: indices of the records that are trained on, in order.
        held_out: indices of the others, in order.
        questions: the first question of each record held out, in the form of `test.jsonl`.
    """

    training: list[int]
    held_out: list[int]
    questions: list[TestRecord]


def validation_split(records: TrainingRecords, share: float, seed: int) -> ValidationSplit:
    """Take a share of the records with images, by whole patients or, where none is known, by images.

    The parts depend on the records, the share and the seed alone: they are the same for every method, on every rank
    and in every launch. Common answers have the same share in both, as nearly as whole patients allow. Records
    without an image are trained on.

    Args:
        share: of the records, in (0, 1).

    Raises:
        ValueError: the share is no such number.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of {share} for validation is not between 0 and 1")
    indices, keys, answers = [], [], []
    for index, record in enumerate(records):
        if record.images and question_of(record):
            patient = [] if record.patient is None else [f"patient {record.patient}"]
            indices.append(index)
            keys.append([*patient, *(f"image {name}" for name in record.images)])
            answers.append(final_answer(_first_answer(record)).text.strip().lower())
    groups = connected(keys)
    drawn = drawn_groups(groups, answers, share, seed)
    held_out = [index for index, group in zip(indices, groups, strict=True) if group in drawn]
    chosen = set(held_out)
    questions = [question for index in held_out if (question := question_of(records[index]))]
    return ValidationSplit([index for index in range(len(records)) if index not in chosen], held_out, questions)


def question_of(record: TrainingRecord) -> TestRecord | None:
    """The first question of a conversation in the form of `test.jsonl`; None where it has no image or no answer."""
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


def _first_answer(record: TrainingRecord) -> str:
    return next(turn.text for turn in record.turns if turn.speaker == "gpt")
