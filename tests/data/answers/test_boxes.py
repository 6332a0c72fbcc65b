"""Boxes as answers: read from records in pixels, written as each family writes them, and back again."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mslora_cr.data.answers.boxes import PIXELS, Box, BoxRule, pixels
from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.data.records import DataError, TestRecord, TestRecords, TrainingRecord
from mslora_cr.evaluation.score import BOXES, score_file
from mslora_cr.models.load import box_rule_of, input_processor_in
from tests.helpers.families import FAMILIES, make

RULES = {
    "llava": "square",
    "llava_next": "square",
    "gemma3": "thousandths",
    "idefics3": "thousandths",
    "smolvlm": "thousandths",
    "qwen2_5_vl": "resized",
    "qwen3_vl": "thousandths",
    "internvl": "thousandths",
}
SIZE = (110, 45)


def training_record(folder: Path, *boxes: list[float]) -> TrainingRecord:
    if not (folder / "a.png").exists():
        Image.effect_noise(SIZE, 60).convert("RGB").save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhere is it?"}, {"from": "gpt", "value": "At <box>."}]
    return TrainingRecord.model_validate(
        {"id": 1, "image": "a.png", "conversations": turns, "boxes": list(boxes), "size": list(SIZE)}
    )


def learned(processor: InputProcessor, record: TrainingRecord, folder: Path) -> str:
    batch = processor.collator()([processor.sample(0, record, [folder])])
    labels = batch["labels"][0]
    [text] = processor.tokenizer.decode([labels[labels != IGNORE_INDEX].tolist()])
    return text


@pytest.mark.parametrize("family", RULES)
def test_what_a_family_learns_is_read_back_within_a_pixel(family: str, tmp_path: Path) -> None:
    assert RULES.keys() == FAMILIES.keys()
    make(family, tmp_path / "model")
    processor, rule = input_processor_in(tmp_path / "model", 4096), box_rule_of(tmp_path / "model")
    assert rule.kind == RULES[family]
    box = Box(13, 7.5, 96, 31)
    text = learned(processor, training_record(tmp_path, [*box]), tmp_path)
    back = rule.read(text, SIZE)
    assert back is not None and max(abs(ours - theirs) for ours, theirs in zip(back, box, strict=True)) <= 1, text
    question = TestRecord.model_validate(
        {"question_id": 1, "image": "a.png", "text": "what is in <box>?", "gt": "<box>", "answer_type": "OPEN",
         "boxes": [[*box], [0, 0, 5, 5]], "size": [*SIZE]}
    )  # fmt: skip
    assert question.gt == "[0, 0, 5, 5]" and question.boxes == (box,)
    assert rule.write(box, SIZE) in processor.prompt(question, [tmp_path]).text


def test_llava_med_writes_fractions_of_the_padded_square(tiny_model: Path, tmp_path: Path) -> None:
    assert box_rule_of(tiny_model) == BoxRule("square")
    assert BoxRule("square").write(Box(0, 0, 100, 50), (100, 50)) == "[0.0000, 0.2500, 1.0000, 0.7500]"


@pytest.mark.parametrize(
    "rule", [BoxRule("square"), BoxRule("thousandths"), BoxRule("resized", 28, 3136, 1 << 20), PIXELS]
)
def test_every_rule_comes_back_within_a_pixel(rule: BoxRule) -> None:
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(60, 2000), draw.randint(60, 2000)
        (x1, x2), (y1, y2) = (sorted(draw.sample(range(side + 1), 2)) for side in size)
        back = rule.read(f"It is at {rule.write(Box(x1, y1, x2, y2), size)}.", size)
        assert back is not None
        assert max(abs(ours - theirs) for ours, theirs in zip(back, (x1, y1, x2, y2), strict=True)) <= 1.0, (rule, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": None}, "boxes need the image's"),
        ({"boxes": [[1, 2, 3]]}, "should be a list of boxes"),
        ({"boxes": [[5, 5, 200, 9]]}, "no box inside an image of 110 × 45"),
        ({"boxes": [[9, 5, 5, 9]]}, "no box inside"),
        ({"boxes": [[1, 1, 2, 2], [1, 1, 2, 2]]}, "2 boxes for 1 marks"),
        ({"boxes": [["1", 1, 2, 2]]}, "should be a list of boxes"),
        ({"size": [110]}, "should be"),
    ],
)
def test_malformed_boxes_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    line = {"question_id": 1, "image": "a.png", "text": "where?", "gt": "<box>", "answer_type": "OPEN"}
    line |= {"boxes": [[1, 1, 9, 9]], "size": [110, 45], **change}
    (tmp_path / "test.jsonl").write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        TestRecords(tmp_path / "test.jsonl")


def test_a_mark_without_boxes_is_text(tmp_path: Path) -> None:
    line = {"question_id": 1, "image": "a.png", "text": "what is <box>?", "gt": "<box>", "answer_type": "OPEN"}
    (tmp_path / "test.jsonl").write_text(json.dumps(line), encoding="utf-8")
    assert TestRecords(tmp_path / "test.jsonl")[0].gt == "<box>"


def test_boxes_are_scored_with_intervals(tmp_path: Path) -> None:
    """IoU 1, 1/3 and none, beside a question that is about no box."""
    truth = [0, 0, 10, 10]
    asked = [
        {"question_id": n, "image": f"{n}.png", "text": "where?", "gt": "<box>", "answer_type": "OPEN",
         "boxes": [truth], "size": [100, 50]}
        for n in range(3)
    ]  # fmt: skip
    asked.append({"question_id": 3, "image": "3.png", "text": "is it?", "gt": "yes", "answer_type": "CLOSED"})
    questions = tmp_path / "test.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    records = TestRecords(questions)
    said = ["<think>[0, 0, 1, 1]</think>[0, 0, 10, 10]", "at [5, 0, 15, 10]", "nowhere", "yes"]
    rows = [
        {"question_id": record.question_id, "prompt": record.text, "text": text, "gt": record.gt,
         "answer_type": record.answer_type}
        for record, text in zip(records, said, strict=True)
    ]  # fmt: skip
    answers = tmp_path / "answer-file.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = score_file(answers, tmp_path, records)
    assert scores.columns["IoU"] == pytest.approx([1, 1 / 3, 0, None])
    assert scores.columns["recall at IoU 0.5"] == [1, 0, 0, None]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["metrics"]["IoU"] == pytest.approx(100 * 4 / 9)
    low, high = metrics["intervals"]["recall at IoU 0.5"]
    assert 0 < low < 100 / 3 < high < 100
    drawn = [json.loads(line) for line in (tmp_path / BOXES).read_text().splitlines()]
    assert drawn[1]["said"] == [5, 0, 15, 10] and drawn[2]["said"] is None and drawn[3] is None
    assert pixels(Box(1, 2.5, 3, 4)) == "[1, 2.5, 3, 4]"
