import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mslora_cr.cli.main import main
from mslora_cr.data.records import DataError, TestRecords
from mslora_cr.evaluation.score import CSV_HEADER, read_answers, read_scores, score_file
from mslora_cr.reporting.run_record import load_published_scores

GOLDEN = Path(__file__).parent.parent / "golden" / "metrics"
LINE = {"question_id": 1, "prompt": "Side?", "text": "Left", "gt": "left", "answer_type": "CLOSED"}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("name", ["closed", "mixed", "open"])
def test_golden_files_byte_for_byte(name, tmp_path):
    score_file(GOLDEN / f"{name}.answers.jsonl", tmp_path / "deep" / "out")
    for file in ("metrics.txt", "hit.csv", "not_hit.csv"):
        assert (tmp_path / "deep" / "out" / file).read_bytes() == (GOLDEN / f"{name}.{file}").read_bytes()


@pytest.mark.skipif("MSLORA_PUBLISHED_RESULTS" not in os.environ, reason="MSLORA_PUBLISHED_RESULTS names no folder")
def test_published_answers_get_their_published_scores(tmp_path):
    """RUN/TASK/answer-file.jsonl and metrics.txt, as published with the method."""
    answers = sorted(Path(os.environ["MSLORA_PUBLISHED_RESULTS"]).glob("*/*/answer-file.jsonl"))
    assert answers
    published = {entry.run: entry.scores for entry in load_published_scores().values()}
    for file in answers:
        scores = score_file(file, tmp_path)
        assert (tmp_path / "metrics.txt").read_bytes() == file.with_name("metrics.txt").read_bytes(), file
        table = published[file.parents[1].name][file.parent.name]
        columns = {"exact": "exact match score", "closed": "close accuracy", "f1": "f1 score"}
        for name, key in columns.items():
            assert (name in table) == (key in scores.metrics)
            assert name not in table or table[name] == pytest.approx(scores.metrics[key], abs=0.005)


def test_several_processes_give_the_same_files(tmp_path, monkeypatch):
    answers = GOLDEN / "mixed.answers.jsonl"
    one = score_file(answers, tmp_path / "one")  # in one batch
    monkeypatch.setattr("mslora_cr.evaluation.score.BATCH", 20)
    assert len(read_answers(answers)) // 20 > 2 * 2
    two = score_file(answers, tmp_path / "two", workers=2)
    assert one == two
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_metrics_json_is_full_precision(tmp_path):
    score_file(GOLDEN / "mixed.answers.jsonl", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    expected = json.loads((GOLDEN / "mixed.expected.json").read_text())
    assert {key: found[key] for key in ("rows", "open", "closed")} == {
        "rows": 240,
        "open": 131,
        "closed": 109,
    }
    published = {name: found["metrics"][name] for name in expected["table"]}
    assert published == pytest.approx(expected["table"], rel=1e-12)
    counted = {"exact count", "count within 1"}
    assert set(found["metrics"]) - set(published) - counted == {
        "exact choice",
        "rouge-l",
        "token recall",
        "squad f1",
        "whole-word accuracy",
        "corpus bleu",
    }
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found["metrics"][name] <= high <= 100
        assert 1 < high - low < 20 or name in counted  # of some 100 questions, or of few
    assert (found["confidence"], found["groups"]) == (0.95, 240)  # no answer names an image
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clinical.json",
        "hit.csv",
        "metrics.json",
        "metrics.txt",
        "not_hit.csv",
        "scores.csv",
    ]


def test_scores_by_question_give_the_averages(tmp_path):
    scores = score_file(GOLDEN / "mixed.answers.jsonl", tmp_path)
    ids, columns, groups, *_ = read_scores(tmp_path / "scores.csv")
    assert len(set(groups)) == len(ids)
    assert ids == [str(answer.question_id) for answer in read_answers(GOLDEN / "mixed.answers.jsonl")]
    averages = {name: 100 * np.nanmean(column) for name, column in columns.items()}
    assert averages == pytest.approx(scores.metrics | scores.added)
    assert np.isnan(columns["close accuracy"]).sum() == scores.open
    assert np.isnan(columns["rouge-l"]).sum() == scores.closed
    with pytest.raises(DataError, match="no scores of answers"):
        read_scores(tmp_path / "none.csv")


@pytest.mark.parametrize("text", ["nothing of it", "mild cardiomegaly without effusion"])
def test_a_corpus_that_is_all_wrong_or_all_right_has_the_interval_of_the_other_scores(tmp_path, text):
    line = LINE | {"answer_type": "OPEN", "gt": "mild cardiomegaly without effusion", "text": text}
    score_file(write(tmp_path / "a.jsonl", *[line] * 12), tmp_path)
    known = json.loads((tmp_path / "metrics.json").read_text())
    assert known["metrics"]["corpus bleu"] == pytest.approx(known["metrics"]["recall"])
    assert known["intervals"]["corpus bleu"] == pytest.approx(known["intervals"]["recall"])
    low, high = known["intervals"]["corpus bleu"]
    assert high - low > 10


def test_questions_about_one_image_are_one_cluster(tmp_path):
    answers = write(tmp_path / "a.jsonl", *[LINE | {"text": text} for text in ("Left", "Left", "Right", "Right")])
    images = ["a.png", "a.png", ["b.png", "c.png"], "b.png"]
    test = [LINE | {"image": image} for image in images]
    questions = TestRecords(write(tmp_path / "test.jsonl", *test))
    score_file(answers, tmp_path, questions)
    assert [row[-2:] for row in rows_of(tmp_path / "scores.csv")[1:]] == [
        [name, name] for name in ["a.png"] * 2 + ["b.png"] * 2
    ]
    table = read_scores(tmp_path / "scores.csv")
    assert table.groups.tolist() == [0, 0, 1, 1]
    assert "image" not in table.columns and list(table.images) == ["a.png", "a.png", "b.png", "b.png"]
    assert json.loads((tmp_path / "metrics.json").read_text())["groups"] == 2
    by_patient = TestRecords(write(tmp_path / "test.jsonl", *[line | {"patient": 7} for line in test]))
    score_file(answers, tmp_path, by_patient)
    assert set(read_scores(tmp_path / "scores.csv").groups) == {0}
    with pytest.raises(DataError, match="4 answers to 3 questions"):
        score_file(answers, tmp_path, by_patient[:3])


def test_the_command_takes_the_questions(tmp_path):
    answers = write(tmp_path / "a.jsonl", *[LINE] * 4)
    test = write(tmp_path / "test.jsonl", *[LINE | {"image": "a.png"}] * 4)
    assert main(["score", str(answers), "--output", str(tmp_path / "out"), "--questions", str(test)]) == 0
    assert set(read_scores(tmp_path / "out" / "scores.csv").groups) == {0}


def test_scores_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "scores.csv").write_text("question_id,answer_type,f1 score\n1,OPEN,0.5\n1,CLOSED,\n")
    ids, columns, groups, *_ = read_scores(tmp_path / "scores.csv")
    assert (ids, list(columns), groups.tolist()) == (["1", "1"], ["f1 score"], [0, 1])


def test_hits_are_by_row_where_ids_repeat(tmp_path):
    answers = write(tmp_path / "a.jsonl", LINE, LINE | {"text": "Right"}, LINE | {"image": ["a.png", "b.png"]})
    score_file(answers, tmp_path)
    left = ["1", "Side?", "left", "left", "CLOSED"]
    assert rows_of(tmp_path / "hit.csv") == [list(CSV_HEADER), [*left, ""], [*left, "['a.png', 'b.png']"]]
    assert rows_of(tmp_path / "not_hit.csv") == [
        list(CSV_HEADER),
        ["1", "Side?", "right", "left", "CLOSED", ""],
    ]


def test_a_file_without_answers(tmp_path):
    scores = score_file(write(tmp_path / "a.jsonl"), tmp_path)
    assert scores.metrics == {}
    assert (tmp_path / "metrics.txt").read_text().splitlines()[0].split() == ["Metric", "Performance"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "version": 1,
        "metrics": {},
        "intervals": {},
        "confidence": 0.95,
        "empty_truths": 0,
        "rows": 0,
        "groups": 0,
        "freedom": {},
        "largest_cluster": {},
        "open": 0,
        "closed": 0,
    }
    assert rows_of(tmp_path / "hit.csv") == rows_of(tmp_path / "not_hit.csv") == [list(CSV_HEADER)]


@pytest.mark.parametrize("text", ['a\nb\r\nc,"d"', "\u2028\u0085", "\x00", "\ud83d", None, 7, ["x"], "", " "])
def test_text_may_hold_anything(text, tmp_path):
    score_file(write(tmp_path / "a.jsonl", LINE | {"text": text}), tmp_path)
    cell = rows_of(tmp_path / "not_hit.csv")[1][2]
    assert cell == {"\ud83d": "\\ud83d", "None": ""}.get(str(text), str(text).lower())


def test_blank_lines_are_skipped_and_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(LINE | {"text": "x\u2028y"}, ensure_ascii=False)
    path.write_bytes(f"\n{line}\r\n  \n{line}".encode())
    assert [answer.text for answer in read_answers(path)] == ["x\u2028y"] * 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"question_id": 1', "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON in UTF-8"),
        (b"[1, 2]", "expected an object"),
        (json.dumps({key: LINE[key] for key in LINE if key != "gt"}).encode(), "field 'gt' is missing"),
        (
            json.dumps(LINE | {"answer_type": "YESNO"}).encode(),
            "field 'answer_type': .*'OPEN' or 'CLOSED'.*'YESNO'",
        ),
        (json.dumps(LINE | {"prompt": 3}).encode(), "field 'prompt': .*string.*3"),
        (
            json.dumps(LINE | {"question_id": True}).encode(),
            "field 'question_id': should be a string or an integer",
        ),
        (b"[" * 100_000, "line 2"),
    ],
)
def test_a_malformed_line_is_named(line, complaint, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=f"a.jsonl: line 2: .*{complaint}|a.jsonl: {complaint}"):
        score_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_answers(tmp_path / "none.jsonl")
