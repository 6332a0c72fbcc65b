"""Further passes over the same banks: without the picture, with rotated options, over validation questions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mslora_cr.cli.main import main
from mslora_cr.clinical.asked import asked_answers
from mslora_cr.clinical.calibrated import Calibrations, calibrate
from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.config.load import load_config
from mslora_cr.data.records import TestRecords, TrainingRecords
from mslora_cr.data.tasks import task_folder
from mslora_cr.data.validation import validation_split
from mslora_cr.evaluation import summary
from mslora_cr.evaluation.asking import ON_VALIDATION, blind_score, rotated_records
from mslora_cr.evaluation.passes import CIRCULAR, CircularFile
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.utils.errors import UserError
from tests.helpers.chat_server import serving


def test_options_are_moved_on_with_their_truths(tmp_path: Path) -> None:
    lines = [
        {"text": "Which?", "gt": "B", "options": ["lung", "liver", "heart"]},
        {"text": "Which?", "gt": "heart", "options": ["lung", "heart"]},
        {"text": "Is it?", "gt": "yes"},
    ]
    path = tmp_path / "test.jsonl"
    common = {"image": "a.png", "answer_type": "CLOSED"}
    path.write_text("".join(json.dumps({"question_id": n, **line, **common}) + "\n" for n, line in enumerate(lines)))
    one, two = (list(rotated_records(TestRecords(path), by)) for by in (1, 2))
    assert [(record.question_id, record.options, record.gt) for record in one] == [
        (0, {"A": "heart", "B": "lung", "C": "liver"}, "C"),
        (1, {"A": "heart", "B": "lung"}, "heart"),
    ]
    assert [(record.question_id, record.gt) for record in two] == [(0, "A")]


def test_thresholds_rest_on_one_question_of_each_patient() -> None:
    rows = [("Is it?", "yes" if number % 4 else "no", "yes", True) for number in range(40)]
    chances = [{"yes": 0.9 if number % 4 else 0.2, "no": 0.1 if number % 4 else 0.8} for number in range(40)]
    asked = asked_answers(rows, None, chances)
    found = calibrate("CXP", 1, ["ab"], asked, [-0.1 if n % 4 else -0.9 for n in range(40)], np.arange(40) // 2)
    assert len(found.right) == 20 and found.questions == 40 and found.temperature is not None
    sure = [confidence for confidence, right in zip(found.confidence, found.right, strict=True) if right]
    assert found.threshold(0.05) == pytest.approx(min(sure)), "all that are sure are right"
    with pytest.raises(UserError, match=r"questions of 20 patients or images promise no risk below 0\.048"):
        found.threshold(0.01)


def test_held_out_training_records_are_asked_where_there_is_no_val_jsonl(trained_config: Path, tmp_path: Path) -> None:
    given = load_config(trained_config)
    task, update = given.task("PCAM"), {"data": given.data.model_copy(update={"validation": 0.5})}
    config = ON_VALIDATION.config(given.model_copy(update={**update, "results_dir": str(tmp_path)}))
    assert ON_VALIDATION.is_there(config, task) and not ON_VALIDATION.is_there(given, task)
    records = ON_VALIDATION.records(config, task)
    assert records.path == tmp_path / "tiny" / "validation" / "PCAM" / "questions.jsonl"
    trained = validation_split(TrainingRecords(task_folder(config, task) / "train.json"), 0.5, config.seed)
    assert list(records) == trained.questions


def test_passes_of_an_evaluation(
    trained_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(trained_config)
    data, results = tmp_path / "data", tmp_path / "results" / "tiny"
    shutil.copytree(config.data.root, data)
    folder = data / task_folder(config, config.task("PCAM")).relative_to(config.data.root)
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    validation = [line | {"patient": f"{place} {n}"} for n in range(3) for place, line in enumerate(lines)]
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validation))
    lines[0] |= {"options": ["yes", "no"], "gt": "A", "answer_type": "CLOSED"}
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read: list[int] = []
    digest = summary.images_digest
    monkeypatch.setattr(summary, "images_digest", lambda images: read.append(len(images)) or digest(images))
    command = [str(trained_config), f"results_dir={tmp_path / 'results'}", f"data.root={data}"]
    assert main(["evaluate", *command, "--task", "PCAM", "--calibrate", "--blind", "--circular"]) == 0
    assert len(read) == 3, "of this task alone, once for each pass with pictures"
    evaluation = read_evaluation(results)
    assert evaluation is not None
    [cell] = evaluation.cells
    blind = blind_score(cell, results)
    assert blind is not None and 0 <= blind.score <= 100 and "without the picture" in capsys.readouterr().out
    [circular] = CircularFile.read(results / CIRCULAR).cells
    assert circular.questions == 1 and circular.circular <= circular.score
    [calibrated] = Calibrations.read(results / "calibration.json").cells
    assert calibrated.questions == 3 * len(lines) == len(calibrated.right)
    banks = finished_banks(config)
    assert calibrated.banks == tuple(banks[name].digest for name in cell.banks)
    clinical = Clinical.read(results / "PCAM" / CLINICAL)
    assert clinical.closed is not None and clinical.closed.choices is not None
    image = str(next(data.rglob("*.png")))
    asked = ["ask", *command, "--task", "PCAM", "--stage", "3", "--image", image, "Is it?"]
    assert main([*asked, "--risk", "0.9"]) == 0 and main([*asked, "--risk", "0.001"]) == 1
    assert "promise no risk below" in capsys.readouterr().err

    # The same of routed answers and of a served model, each beside its own answers.
    passes = ["--calibrate", "--blind", "--circular"]
    assert main(["evaluate", *command, "--banks-by", "routed", *passes]) == 0
    with serving() as server:
        served = ["--endpoint", server.url, "--model", "llava", "--task", "PCAM"]
        assert main(["evaluate", *command, *served, *passes]) == 0
        images = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    grey = sum(image == images[-2] for image in images)  # the last one asks the rotated options
    assert grey == len(lines) and len(images) == 5 * len(lines) + 1
    for results_of, stage in ((results / "routed", "PCAM/stage-3"), (results / "served" / "llava", "PCAM")):
        cells = read_evaluation(results_of)
        assert cells is not None
        cell = next(cell for cell in cells.cells if cell.task == "PCAM")
        blind = blind_score(cell, results_of)
        assert blind is not None and (results_of / "blind" / stage / "answer-file.jsonl").is_file()
        assert [of.questions for of in CircularFile.read(results_of / CIRCULAR).cells] == [1]
        [calibrated] = Calibrations.read(results_of / "calibration.json").cells
        assert (calibrated.task, calibrated.stage, calibrated.questions) == ("PCAM", 3, 3 * len(lines))
