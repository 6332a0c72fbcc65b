"""What people have where this project's files are expected is recognised, and they are told what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mslora_cr.cli.main import main
from mslora_cr.data.images import load_image
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords

ASKED = {"from": "human", "value": "<image>\n?"}


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"conversations": [{"role": "user", "content": "?"}]}, "the form of chat messages"),
        ({"messages": [{"role": "user", "content": "?"}]}, "the form of chat messages"),
        ({"conversations": [{"from": "system", "value": "?"}, ASKED]}, "this is ShareGPT's form"),
        ({"question": "?", "answer": "yes"}, "question and answer must become a conversation"),
    ],
)
def test_records_of_other_programs(record: dict[str, Any], advice: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"id": 0, "image": "a.png"} | record]))
    with pytest.raises(DataError, match=advice):
        TrainingRecords(path)


def test_what_is_beside_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mslora-cr data download.*link_assets\.sh"):
        TrainingRecords(tmp_path / "PathVQA" / "train.json")
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(DataError, match=r"data\.json next to it: rename"):
        TestRecords(tmp_path / "test.jsonl")
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(DataError, match=r"rows\.csv is next to it: `mslora-cr data convert` makes a data set"):
        TrainingRecords(tmp_path / "train.json")


def test_a_dicom_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(128) + b"DICM" + bytes(100))
    with pytest.raises(DataError, match=r"a DICOM file.*`mslora-cr data convert` draws it"):
        load_image(tmp_path / "a.png")


def test_data_check_takes_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "root" / "Mine"
    place.mkdir(parents=True)
    turns = [ASKED, {"from": "gpt", "value": "yes"}]
    (place / "train.json").write_text(json.dumps([{"id": 0, "image": "a.png", "conversations": turns}]))
    row = {"question_id": 0, "image": "b.png", "text": "?", "gt": "yes", "answer_type": "CLOSED"}
    (place / "test.jsonl").write_text(json.dumps(row) + "\n")
    settings = {
        "run": "r",
        "model": {"path": str(tmp_path / "nowhere")},
        "data": {"root": str(tmp_path / "root")},
        "datasets": {"mine": {"modality": "pathologie", "folder": "Mine"}},
        "tasks": [{"name": "mine", "epochs": 1, "batch_size": 4, "learning_rate": 1e-3}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    output = str(tmp_path / "check.json")
    assert main(["data", "check", str(tmp_path / "run.yaml"), "--no-images", "--output", output]) == 0
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert (
        "mine" in said
        and "warning: mine: modality 'pathologie' is not in the catalogue; did you mean 'pathology'?" in said
    )
    assert "pathvqa" not in said and "published test set" not in said
