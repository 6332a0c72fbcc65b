"""A share of the training records for validation: whole patients, the same at every call, answers balanced."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mslora_cr.data.grouping import connected, drawn_groups
from mslora_cr.data.records import TrainingRecords
from mslora_cr.data.validation import validation_split


def written(path: Path, patients: bool = True) -> TrainingRecords:
    """200 records of 50 patients, a fifth of them answered yes; one conversation has no image."""
    content = []
    for number in range(200):
        answer = "yes" if number % 5 == 0 else "no"
        turns = [{"from": "human", "value": "<image>\nIs it there?"}, {"from": "gpt", "value": answer}]
        patient = {"patient": f"p{number // 4}"} if patients else {}
        content.append({"id": number, "image": f"{number // 2}.png", "conversations": turns, **patient})
    content.append({"id": 200, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]})
    path.write_text(json.dumps(content))
    return TrainingRecords(path)


@pytest.mark.parametrize("patients", [True, False])
def test_no_patient_and_no_image_is_on_both_sides(patients: bool, tmp_path: Path) -> None:
    records = written(tmp_path / "train.json", patients)
    split = validation_split(records, 0.1, seed=3)
    assert sorted([*split.training, *split.held_out]) == list(range(201)) and 200 in split.training
    for of in (lambda record: record.patient or record.images, lambda record: record.images):
        sides = [{of(records[index]) for index in side if index < 200} for side in (split.training, split.held_out)]
        assert not sides[0] & sides[1]
    assert [question.question_id for question in split.questions] == split.held_out
    assert (split.questions[0].text, split.questions[0].answer_type) == ("Is it there?", "CLOSED")
    assert 18 <= len(split.held_out) <= 24
    assert 3 <= Counter(question.gt for question in split.questions)["yes"] <= 6  # 4 of 20 are a fifth


def test_it_depends_on_records_share_and_seed_alone(tmp_path: Path) -> None:
    records = written(tmp_path / "train.json")
    first, again, other = (validation_split(records, 0.1, seed) for seed in (0, 0, 1))
    assert first == again and first.held_out != other.held_out
    with pytest.raises(ValueError, match="a share of 1 for validation is not between 0 and 1"):
        validation_split(records, 1, 0)


def test_rows_are_joined_through_others() -> None:
    groups = connected([["a", "b"], ["c"], ["b", "d"], ["e"], ["d", "c"]])
    assert len({groups[0], groups[1], groups[2], groups[4]}) == 1 and groups[3] not in groups[:3]


def test_a_rare_answer_has_its_share() -> None:
    """10 % of 400 rows are positive: 8 of 80 are wanted, and a draw without regard to answers would give 8 ± 2.5."""
    answers = ["yes" if number % 10 == 0 else "no" for number in range(400)]
    groups = [str(number) for number in range(400)]
    for seed in range(20):
        drawn = drawn_groups(groups, answers, 0.2, seed)
        assert Counter(answers[int(name)] for name in drawn) == {"yes": 8, "no": 72}
    assert len(drawn_groups(["one"] * 5, answers[:5], 0.5, 0)) == 0
