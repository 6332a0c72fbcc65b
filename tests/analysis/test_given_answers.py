"""Answer files alone: scored, and shown beside the pictures of the questions that they answer."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.evaluation.results import required_evaluation
from tests.helpers.report_run import Page, answer_lines


def test_published_answers_are_shown_with_the_pictures_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, data = tmp_path / "RUN", tmp_path / "data"
    overrides = [f"data.root={data}", f"results_dir={tmp_path / 'results'}"]
    config = load_config("finetune_lora_each", overrides)
    folder = data / config.task("slake-vqarad").folder
    (folder / "a").mkdir(parents=True)
    Image.new("RGB", (30, 20), "pink").save(folder / "a" / "0.png")
    for task in ("slake-vqarad", "PCAM"):
        lines = answer_lines(task, right=15)
        (given / task).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (given / task / "answer-file.jsonl").write_text(text, encoding="utf-8")
    asked = [
        {"question_id": line["question_id"], "image": f"a/{number % 2}.png", "text": line["prompt"], "gt": line["gt"],
         "answer_type": line["answer_type"]}
        for number, line in enumerate(answer_lines("slake-vqarad", right=0))
    ]  # fmt: skip
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    command = ["report", "finetune_lora_each", "--answers", str(given), *overrides]
    assert main(command) == 0
    results = config.results_run_dir / "given" / "RUN"
    evaluation = required_evaluation(results)
    assert {cell.task: cell.metrics["close accuracy"] for cell in evaluation.cells} == {"slake-vqarad": 75, "PCAM": 75}
    joined, alone = (next(cell for cell in evaluation.cells if cell.task == task) for task in ("slake-vqarad", "PCAM"))
    assert joined.banks == ("slake-vqarad",) and joined.largest_cluster["close accuracy"] == 0.5  # of two pictures
    assert alone.questions == "" != joined.questions
    page = Page(results / "report.html")
    assert "1 of 2 images are missing" in page.text and page.data is not None
    assert "data:image/" in (results / "report.html").read_text(encoding="utf-8")

    # Answers to other questions do not get these pictures.
    (folder / "test.jsonl").write_text("".join(json.dumps(line | {"text": "?"}) + "\n" for line in asked))
    assert main(command) == 0
    assert {cell.questions for cell in required_evaluation(results).cells} == {""}
    assert main(["report", "finetune_lora_each", "--answers", str(data), *overrides]) == 1
    assert "no TASK/answer-file.jsonl of the configuration's tasks" in capsys.readouterr().err
