"""The report's browser of answers, its thumbnails and its tables of confusions."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.records import DataError, TestRecords
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.evaluation.score import score_file
from mslora_cr.reporting import render, thumbnails
from mslora_cr.reporting.answers import OTHER, browsed_answers, confusions
from mslora_cr.reporting.heatmaps import answer_maps
from mslora_cr.reporting.report import write_report
from tests.helpers.report_run import MODALITIES, Page, make_run

TASKS = ("pathvqa", "slake-vqarad")
HOSTILE = "</script><!--<script><img src=x onerror=\"document.title='owned'\">"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def forgets(task, stage):
    """18 of 20 right at a task's own stage, four fewer at each later one."""
    return 18 - 4 * (stage - 1 - TASKS.index(task))


def with_pictures(root, run, side=300):
    """A data root whose test files are those that the run's answers are for: a picture each four questions."""
    run_dir, results_dir = run
    path = results_dir / "evaluation.json"
    evaluation = json.loads(path.read_text())
    data = root / "data"
    for number, task in enumerate(TASKS):
        folder = data / task / "images"
        folder.mkdir(parents=True)
        lines = [json.loads(line) for line in (results_dir / task / "answer-file.jsonl").read_text().splitlines()]
        questions = []
        for row, line in enumerate(lines):
            name = f"images/{row // 4}.png"
            Image.new("RGB", (side, side // 2), (row, 100 * number, 50)).save(data / task / name)
            fields = {key: line[key] for key in ("question_id", "gt", "answer_type")}
            questions.append({**fields, "text": line["prompt"], "image": name})
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (data / task / "test.jsonl").write_text(text)
        for cell in evaluation["cells"]:
            if cell["task"] == task:
                cell["questions"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(evaluation))
    settings = {
        "run": results_dir.name,
        "output_dir": str(run_dir.parent),
        "results_dir": str(results_dir.parent),
        "model": {"path": "none"},
        "data": {"root": str(data)},
        "datasets": {task: {"modality": MODALITIES[task], "folder": task} for task in TASKS},
        "tasks": [{"name": task, "epochs": 1, "batch_size": 1, "learning_rate": 1e-3} for task in TASKS],
    }
    return StreamConfig.model_validate(settings)


def test_every_answer_is_in_the_page_with_its_picture_before_and_after(tmp_path):
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run)
    path = write_report(*run, config)
    page = Page(path)
    assert page.data["last"] == 2
    assert [(task["name"], task["learned_at"], len(task["rows"])) for task in page.data["tasks"]] == [
        ("pathvqa", 1, 40),
        ("slake-vqarad", 2, 40),
    ]
    first = page.data["tasks"][0]
    assert [(found["stages"], found["banks"]) for found in first["sets"]] == [([1], "1"), ([2], "2")]
    question, truth, closed, pictures, answers, which, _ = first["rows"][15]
    assert "Confusions of closed answers" in page.text and "truth ↓ answer →" in page.text
    assert (question, truth) == ("What about <b>pathvqa</b> | no 15?", "Mild cardiomegaly, no effusion.")
    assert [answers[place][1] for place in which] == [1, 0]  # right when learned, forgotten at the end
    assert closed == 0 and pictures == [3]
    assert first["rows"][0][5] == [0, 0]  # an answer that stayed is written once
    assert 0 < sum(row[6] for row in first["rows"]) <= 6  # right answers that show at first
    small = base64.b64decode(page.data["thumbnails"][3].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size) == ("WEBP", (144, 72))
    assert len(page.data["thumbnails"]) == 20
    assert page.loads == []
    assert path.stat().st_size < 1_000_000
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', path.read_text(encoding="utf-8"))[1]
    for script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_many_pictures_go_beside_the_page_and_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "MOST_INSIDE", 10)
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run, side=40)
    folder = run[1] / "report-images"
    page = Page(write_report(*run, config))
    files = sorted(folder.iterdir())
    assert sorted(page.data["thumbnails"]) == [f"report-images/{file.name}" for file in files]
    assert len(files) == 20
    times = [file.stat().st_mtime_ns for file in files]
    (tmp_path / "data" / "pathvqa" / "images" / "0.png").write_bytes(b"damaged")
    page = Page(write_report(*run, config))
    remaining = [file for file in files if file.exists()]
    assert len(remaining) == 19 and [file.stat().st_mtime_ns for file in remaining] == [
        time for file, time in zip(files, times, strict=True) if file.exists()
    ]
    assert re.search(r"1 images that cannot be read, such as \S*pathvqa/images/0.png", page.text)


def test_pictures_of_other_questions_are_not_shown(tmp_path):
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run, side=8)
    with (tmp_path / "data" / "pathvqa" / "test.jsonl").open("a") as file:
        file.write("\n")
    (tmp_path / "data" / "slake-vqarad" / "images" / "0.png").unlink()
    page = Page(write_report(*run, config))
    assert "no pictures of pathvqa: " in page.text and "is not the file that was asked from" in page.text
    assert "no pictures of slake-vqarad: 1 of 10 images are missing below" in page.text
    assert all(row[3] == [] for row in page.data["tasks"][0]["rows"])
    assert len(page.data["thumbnails"]) == 9


def test_pictures_are_those_that_the_scores_name(tmp_path):
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run, side=8)
    for task in TASKS:
        questions = tmp_path / "data" / task / "test.jsonl"
        for answers in (run[1] / task).rglob("answer-file.jsonl"):
            score_file(answers, answers.parent, TestRecords(questions))
        with questions.open("a") as file:
            file.write("\n")  # another file than the one that was asked from
    scores = run[1] / "slake-vqarad" / "scores.csv"
    scores.write_text(scores.read_text().replace("images/0.png", "../../../outside.png"))
    page = Page(write_report(*run, config))
    assert "is not the file that was asked from" not in page.text
    assert [row[3] for row in page.data["tasks"][0]["rows"]] == [[row // 4] for row in range(40)]
    assert [row[3] for row in page.data["tasks"][1]["rows"][:5]] == [[]] * 4 + [[10]]
    assert "no pictures of slake-vqarad: 1 of 10 images are missing below" in page.text
    scores.write_text(scores.read_text().replace("recall", "another"))
    with pytest.raises(DataError, match=r"scores\.csv: has no recall; score the answers again"):
        write_report(*run, config)


def test_boxes_are_drawn_in_shares_of_the_picture(tmp_path):
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run, side=8)
    rows = [{"said": [10, 0, 60, 25], "truth": [0, 0, 50, 25], "size": [100, 50], "iou": 0.5}] + [None] * 39
    boxes = run[1] / "pathvqa" / "boxes.jsonl"
    boxes.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = Page(write_report(*run, config))
    first, second = page.data["tasks"][0]["rows"][:2]
    assert first[7] == [0, 0, 0.5, 0.5] and first[4][0][3] == [0.1, 0, 0.6, 0.5]
    assert len(second) == 7 and len(second[4][0]) == 3
    boxes.write_text('{"said": 1, "truth": [0, 0, 50, 25], "size": [0, 50]}\n')
    with pytest.raises(DataError, match="no boxes of answers"):
        write_report(*run, config)


def test_what_is_in_training_and_testing_is_said_beside_the_scores(tmp_path):
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run, side=8)
    for task in TASKS:
        digest = TestRecords(tmp_path / "data" / task / "test.jsonl").digest
        shared = {"images": 3, "contents": None, "patients": 0, "questions": 12, "test_questions": 40}
        (tmp_path / "data" / task / "leaks.json").write_text(json.dumps({"train": "0" * 64, "test": digest, **shared}))
    (tmp_path / "data" / "slake-vqarad" / "test.jsonl").write_text("")  # what was found is of the questions asked
    page = Page(write_report(*run, config))
    words = "12 of 40 test questions are about what is trained on, too (3 images): their scores are too high"
    assert f"pathvqa: {words}" in page.text and f"slake-vqarad: {words}" in page.text
    assert f"- **pathvqa**: {words}" in (run[1] / "report.md").read_text()
    leaks = tmp_path / "data" / "pathvqa" / "leaks.json"
    leaks.write_text(leaks.read_text().replace('"test": "', '"test": "0'))
    assert f"pathvqa: {words}" not in Page(write_report(*run, config)).text  # of a file that was not asked from
    assert "trained on" not in Page(write_report(*run)).text


def test_hostile_text_stays_text(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    for answers in (results_dir / "pathvqa").rglob("answer-file.jsonl"):
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        for line in lines:
            line.update(prompt=HOSTILE, text=HOSTILE + "\ud83d", gt=HOSTILE)
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        score_file(answers, answers.parent)
    path = write_report(run_dir, results_dir)
    page = Page(path)
    assert page.data["tasks"][0]["rows"][0][:2] == [HOSTILE, HOSTILE]
    assert "onerror" not in str(page.loads)
    assert "<img" not in path.read_text(encoding="utf-8")


def test_confusions_of_closed_answers(tmp_path):
    _, results_dir = make_run(tmp_path, "own", tasks=("derm",), stages="own")
    answers = results_dir / "derm" / "answer-file.jsonl"
    said = [("benign", "Benign."), ("benign", "malignant"), ("malignant", "It is malignant"), ("malignant", "a mole")]
    lines = [
        {"question_id": row, "prompt": "?", "text": text, "gt": truth, "answer_type": "CLOSED"}
        for row, (truth, text) in enumerate(said)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_file(answers, answers.parent)
    [task] = browsed_answers(read_evaluation(results_dir), results_dir, None).tasks
    columns, rows = confusions(task, task.learned)
    assert columns == ["benign", "malignant", OTHER]
    assert rows == {"benign": [1, 1, 0], "malignant": [0, 0, 2]}, "a sentence around the truth is no exact choice"
    [drawn] = answer_maps(task, last=1)
    assert (drawn.title, drawn.columns) == ("derm, stage 1", columns)
    assert [(cell.text, cell.tint) for cell in drawn.rows["malignant"]] == [("", None), ("", None), ("2", 1.0)]


def test_published_scores_stand_beside_the_published_questions_only(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "own", tasks=("pathvqa", "derm"), stages="own", published=True)
    path = results_dir / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["cells"][1]["rows"] -= 1
    path.write_text(json.dumps(evaluation))
    page = Page(write_report(run_dir, results_dir))
    assert "91.54" in page.text and "89.73" not in page.text
    evaluation["cells"][0]["rows"] = 160
    path.write_text(json.dumps(evaluation))
    page = Page(write_report(run_dir, results_dir))
    assert "published" not in page.text.lower().replace("published closed accuracy", ""), "the name of our own score"


def test_the_answers_name_what_joins_them(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "own", tasks=("derm",), stages="own")
    answers = results_dir / "derm" / "answer-file.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines[0] |= {"question_id": "q7", "image": "images/a.png", "patient": "P 1"}
    lines[1] |= {"image": "patient 2/b.png"}
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_file(answers, answers.parent)
    [task] = Page(write_report(run_dir, results_dir)).data["tasks"]
    assert task["keys"][:3] == [["q7", "images/a.png", "P 1"], ["1", "patient 2/b.png", ""], ["2", "", ""]]


@pytest.mark.skipif(NODE is None, reason="needs Node")
def test_saved_tables_have_keys_and_no_dashes():
    def ran(script, function, given):
        source = (render.TEMPLATES / script).read_text(encoding="utf-8")
        code = re.search(rf"function {function}\(.*?\n}}\n", source, re.DOTALL)[0]
        code += f"const Node = {{ TEXT_NODE: 3 }}; console.log(JSON.stringify({function}({given})))"
        return json.loads(subprocess.run([NODE, "-e", code], capture_output=True, check=True, timeout=60).stdout)

    entry = {"task": {"name": "derm", "keys": [["q7", "a.png", ""]]}, "row": ["Is it?", "–", 1], "index": 0}
    header, row = ran("browser.js", "csvRows", json.dumps([{"entry": entry, "answer": ["no", 0, 0], "sure": 0.9}]))
    assert dict(zip(header, row, strict=True)) == {
        "task": "derm",
        "row": 0,
        "question_id": "q7",
        "image": "a.png",
        "patient": "",
        "answer_type": "CLOSED",
        "question": "Is it?",
        "truth": "–",
        "answer": "no",
        "right": 0,
        "score": 0,
        "fate": "",
        "probability": 0.9,
    }
    cells = [{"colSpan": 1, "textContent": text, "dataset": {}} for text in ("derm", " – ", "3")]
    assert ran("page.js", "tableRows", json.dumps({"rows": [{"cells": cells}]})) == [["derm", "", "3"]]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_a_browser_shows_the_answers_and_runs_nothing_of_the_data(tmp_path):
    run = make_run(tmp_path, "seq", "sequential", TASKS, right=forgets)
    config = with_pictures(tmp_path, run, side=40)
    for answers in run[1].rglob("answer-file.jsonl"):
        answers.write_text(answers.read_text().replace("no finding", json.dumps(HOSTILE)[1:-1]))
        score_file(answers, answers.parent)
    path = write_report(*run, config)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()], capture_output=True, timeout=120
    ).stdout.decode()
    assert "<title>seq · MSLoRA-CR</title>" in seen
    # two tasks with 2 of each 20 wrong, and 6 right ones of each task
    assert re.search(r'id="count"[^>]*>20 of 80 questions: 8 wrong, 12 right<', seen)
    assert seen.count('<article class="answer') == 20
    assert seen.count('<img loading="lazy"') == 20
    assert "forgotten: right, then wrong (8)" in seen
    assert "&lt;img src=x onerror" in seen
    assert seen.count('class="csv"') == seen.count("<table class=") - seen.count('<table class="pairs"')
    assert 'data-tip="95 %:' in seen and "<td title" not in seen
