"""Cards of closed questions in the report."""

import json
from pathlib import Path

import numpy as np
import pytest

from mslora_cr.clinical.asked import asked_answers
from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.clinical.groups import changes_by_group
from mslora_cr.clinical.measure import clinical_of
from mslora_cr.data.records import TestRecord
from mslora_cr.reporting.clinical_cards import _card
from mslora_cr.reporting.report import write_report
from mslora_cr.statistics.intervals import independent
from tests.helpers.report_run import Page, make_run

QUESTION = "Is there pneumonia?"


def test_the_report_says_what_guessing_gives_and_lists_the_classes(tmp_path: Path) -> None:
    run_dir, results_dir = make_run(tmp_path, "seq", "sequential", ("pathvqa", "derm"), right=lambda task, stage: 18)
    page = write_report(run_dir, results_dir)
    html, markdown = Page(page).text, page.with_suffix(".md").read_text(encoding="utf-8")
    for text in (html, markdown):
        assert "Closed questions as a clinician reads them" in text and "by guessing (the best constant answer" in text
    assert "| class | questions | said | recall | precision |" in markdown
    assert "none of these: wrong" in html and "none of these: wrong" in markdown
    assert "Corpus BLEU" in html and "Soft accuracy" not in html, "columns without a value are left out"
    assert "not checked" in html and "to know about" not in html
    file = results_dir / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["cells"][-1] |= {"unfinished": 30, "overlong": 30}
    file.write_text(json.dumps(evaluation))
    page = write_report(run_dir, results_dir)
    for text in (Page(page).text, page.with_suffix(".md").read_text(encoding="utf-8")):
        assert "derm, stage 2: 30 of 40 answers (75 %) were cut off" in text and "does not end them" in text
    for found in results_dir.rglob(CLINICAL):
        found.unlink()
    assert "Closed questions as a clinician" not in Page(write_report(run_dir, results_dir)).text, "of earlier versions"


def test_groups_of_patients_have_scores_gap_and_association() -> None:
    """View AP goes with the answer; of twelve patients over sixty the model misses every second one."""
    records, rows = [], []
    for number in range(48):
        old, yes = number % 4 == 0, number % 2 == 0
        line = {"question_id": number, "image": f"{number}.png", "text": QUESTION, "gt": "yes" if yes else "no"}
        about = {"view": "AP" if yes else "PA", "sex": "F" if old else "M"} if number else {"sex": "F"}
        records.append(TestRecord.model_validate(line | {"answer_type": "CLOSED", "attributes": about}))
        rows.append((QUESTION, "no" if old and number % 8 == 0 else line["gt"], line["gt"], True))
    found = clinical_of(asked_answers(rows, records), independent(48))
    view, sex = found.subgroups["view"], found.subgroups["sex"]
    assert view.association.value == pytest.approx(1.0) and view.missing == 1
    assert sex.worst == "F" and sex.gap is not None and sex.gap.value == pytest.approx(0.5)
    assert sex.groups["F"].p is not None and sex.groups["F"].p < 0.01
    assert Clinical.model_validate_json(found.model_dump_json()) == found
    assert found.closed is not None
    gone = changes_by_group(
        [record.attributes for record in records], np.repeat([-1.0, 0.0], [12, 36]), independent(48)
    )
    assert {value: points for value, (points, _) in gone["sex"].items()} == {"F": -25.0, "M": -25.0}
    assert gone["view"]["AP"][1].lost == 5
    changes = {name: {value: f"{points:+.1f}" for value, (points, _) in by.items()} for name, by in gone.items()}
    card = _card("cxp", 2, found, found.closed, changes)
    line, groups = card.attributes["sex"]
    assert [row[-1] for row in groups] == ["-25.0", "-25.0"]
    assert "Shortcut: this attribute alone gives 100.0 %, which the model is not above" in card.attributes["view"][0]
    assert card.dots is not None and "sex: F (12)" in card.dots and card.curves is None
    assert line.startswith("largest gap 50.0 [") and "worst: F" in line
    assert [row[:3] for row in groups] == [["F", "12", "12"], ["M", "36", "36"]]
    assert card.enough.startswith(
        "48 questions of 48 images or patients, design effect 1.0: the rarest class, 24 questions"
    )


def test_a_card_has_probabilities_counts_and_sets() -> None:
    lines, rows, chances = [], [], []
    for number in range(60):
        kind = ("choice", "number", "set")[number % 3]
        truth = {"choice": ("no", "yes")[number % 2], "number": str(number % 7), "set": "oedema, effusion"}[kind]
        said = {"choice": truth, "number": f"{number % 7 + 1} cells", "set": "effusion"}[kind]
        line = {"question_id": number, "image": f"{number}.png", "text": f"What {kind}?", "gt": truth}
        closed = kind == "choice"
        lines.append(line | {"answer_type": "CLOSED" if closed else "OPEN", "answer_kind": kind})
        rows.append((f"What {kind}?", said, truth, closed))
        chances.append({"no": 0.2, "yes": 0.8} if truth == "yes" else {"no": 0.7, "yes": 0.3} if closed else None)
    asked = asked_answers(rows, [TestRecord.model_validate(line) for line in lines], chances)
    found = clinical_of(asked, independent(60))
    card = _card("cxp", 1, found, found.closed)
    calibration, counts, sets = card.lines
    assert calibration.startswith("Calibration error 25.0 % (no temperature") and "Brier score 0.065" in calibration
    assert "100.0 and 100.0 % right of the surest 80 and 90 %" in calibration
    assert counts.startswith("Counts, 20 questions: mean absolute error 1.00, exact 0.0 [0.0 to ")
    assert sets.startswith("Sets of labels, 20: F1 66.7 [") and card.labels[0][:3] == ["effusion", "20", "20"]
    assert card.confusion[1:] == [["no", "10", "0", "0"], ["yes", "0", "10", "0"]]
    assert "sensitivity of yes" in card.figures
    alone = _card("nuclei", 1, found.model_copy(update={"closed": None}), None)
    assert (alone.guessing, alone.enough, alone.classes) == ("", "", []) and len(alone.lines) == 2
