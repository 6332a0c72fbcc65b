"""`clinical.json` and what the console says of guessing."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mslora_cr.clinical.asked import asked_answers
from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.clinical.measure import clinical_of
from mslora_cr.clinical.training import training_frequencies
from mslora_cr.data.records import TrainingRecords
from mslora_cr.evaluation.score import score_file
from mslora_cr.metrics.guessing import question_key, training_answers
from mslora_cr.statistics.intervals import independent

CELL, COUNT = "Is there a white blood cell?", "How many cells are there?"


def test_a_model_that_always_says_yes_is_not_above_guessing() -> None:
    """58 of 60 are yes: 96.7 % is what the most frequent training answer gives, and the specificity is 0."""
    rows = [(CELL, "yes", "yes" if number < 58 else "no", True) for number in range(60)]
    training = {question_key(CELL): Counter({"yes": 90, "no": 10})}
    found = clinical_of(asked_answers(rows, None), independent(60), training)
    assert found.closed is not None and found.closed == found.by_question[0].model_copy(update={"question": None})
    assert found.closed.figures["specificity"].value == 0 and found.closed.figures["sensitivity"].value == 1
    assert found.closed.figures["specificity"].interval is None, "two questions"
    guessing = found.closed.guessing
    assert (guessing.score, guessing.majority, guessing.hindsight) == pytest.approx((58 / 60,) * 3)
    assert not guessing.above and guessing.in_words() == "always says yes: not above 96.7 % by guessing"


def test_a_model_above_guessing_is_not_marked() -> None:
    rows = [(CELL, "yes" if number % 2 else "no", "yes" if number % 2 else "no", True) for number in range(60)]
    found = clinical_of(asked_answers(rows, None), independent(60), {question_key(CELL): Counter({"yes": 9})})
    assert found.closed is not None and found.closed.guessing.above and found.closed.guessing.in_words() == ""
    assert found.closed.guessing.gain == pytest.approx(50) and found.closed.guessing.majority == 0.5


def test_the_best_constant_in_hindsight_stands_in_for_training_that_is_not_there() -> None:
    rows = [(CELL, "yes", "yes", True)] * 12
    found = clinical_of(asked_answers(rows, None), independent(12))
    assert found.closed is not None and found.closed.guessing.majority is None
    assert found.closed.guessing.in_words() == "always says yes: not above 100.0 % by guessing"


def test_probabilities_give_areas_and_counts_give_errors() -> None:
    random = np.random.default_rng(2)
    yes = random.random(60) < 0.5
    chances = np.clip(0.4 * yes + 0.6 * random.random(60), 0.01, 0.99)
    rows = [
        (CELL, "yes" if p >= 0.5 else "no", "yes" if one else "no", True) for one, p in zip(yes, chances, strict=True)
    ]
    rows += [(COUNT, "3 cells", "4", False)] * 12
    known = [{"yes": float(p), "no": 1 - float(p)} for p in chances]
    found = clinical_of(asked_answers(rows, None, [*known, *[None] * 12]), independent(72))
    assert found.closed is not None
    area = found.closed.figures["AUROC"]
    assert area.interval is not None and area.interval[0] < area.value < area.interval[1]
    assert found.counts is not None and found.counts.questions == 12 and found.counts.exact.value == 0
    assert found.counts.mean_absolute_error is not None and found.counts.mean_absolute_error.value == 1


def test_calibration_of_twenty_questions_worked_by_hand() -> None:
    """Example: 20 questions of 9 patients. Bins of the expected calibration error are ten here."""
    truth = [1] * 8 + [0] * 12
    yes = [
        0.95,
        0.9,
        0.85,
        0.8,
        0.7,
        0.55,
        0.4,
        0.3,
        0.75,
        0.6,
        0.45,
        0.35,
        0.35,
        0.25,
        0.2,
        0.15,
        0.1,
        0.1,
        0.05,
        0.05,
    ]
    words = ("no", "yes")
    rows = [(CELL, words[p > 0.5], words[y], True) for p, y in zip(yes, truth, strict=True)]
    found = clinical_of(asked_answers(rows, None, [{"yes": p, "no": 1 - p} for p in yes]), independent(20))
    assert found.closed is not None and found.closed.calibration is not None
    figures = found.closed.calibration
    assert figures.brier == pytest.approx(0.136875)
    assert (figures.reliability, figures.resolution, figures.uncertainty) == pytest.approx((0.136875, 0.24, 0.24))
    assert figures.risk_coverage_area == pytest.approx(0.073079, abs=1e-6)
    assert (figures.accuracy_at_80, figures.accuracy_at_90) == pytest.approx((0.875, 0.77778), abs=1e-5)
    assert 0 < figures.expected_error < 0.3


def test_scoring_writes_the_file_and_training_records_say_what_is_frequent(tmp_path: Path) -> None:
    rows = [{"question_id": n, "prompt": CELL, "text": "yes", "gt": "yes" if n < 9 else "no"} for n in range(12)]
    answers = tmp_path / "answer-file.jsonl"
    answers.write_text("".join(json.dumps(row | {"answer_type": "CLOSED"}) + "\n" for row in rows))
    said = [{"from": "human", "value": f"<image>\n{CELL}"}, {"from": "gpt", "value": "No"}]
    train = tmp_path / "train.json"
    train.write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": said}]))
    assert training_answers(TrainingRecords(train)) == {question_key(CELL): Counter({"No": 1})}
    assert training_frequencies(tmp_path / "none.json") is None
    score_file(answers, tmp_path, training=training_frequencies(train))
    found = Clinical.read(tmp_path / CLINICAL)
    assert found.closed is not None and found.closed.confusion == ((0, 3, 0), (0, 9, 0))
    guessing = found.closed.guessing
    assert guessing.majority == 0.25 and guessing.gain == 50 and not guessing.above, "twelve questions are few"
    likely = [-0.1 if number < 9 else -2.0 for number in range(12)]
    chances = [{"candidates": ["yes", "no"], "logprobs": [one, -1.0], "lengths": [1, 1]} for one in likely]
    (tmp_path / "probabilities.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chances))
    score_file(answers, tmp_path)
    again = Clinical.read(tmp_path / CLINICAL)
    assert again.closed is not None and again.closed.guessing.majority is None
    assert again.closed.figures["AUROC"].value == 1, "probabilities beside the answers are read"
