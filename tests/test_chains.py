"""Published checkpoint folders are evaluated as they are, through the command line, on the golden model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mslora_cr.cli import main
from tests.conftest import GOLDEN

TASKS = ("pathvqa", "slake-vqarad", "derm", "PCAM")
CHAIN = ["_".join(TASKS[: number + 1]) for number in range(len(TASKS))]
FOLDERS = {"pathvqa": "PathVQA", "slake-vqarad": "Slake-VQARad", "derm": "Fitzpatrick", "PCAM": "PCam"}
RUN = "finetune_lora_MSLoRA-CR-ORTHO-64-64_llava_med_v1.5"
OTHER_SPELLING = RUN.replace("finetune_lora_MSLoRA", "finetune_MSLoRA")

Evaluate = Callable[..., int]


@pytest.fixture(scope="module")
def golden_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden record with an image as a question of each task."""
    root = tmp_path_factory.mktemp("golden")
    records = json.loads((GOLDEN / "conversations.json").read_text())
    rows = [
        {"question_id": record["id"], "image": record["image"], "text": record["conversations"][0]["value"]}
        | {"gt": "yes", "answer_type": "OPEN"}
        for record in records
        if "image" in record
    ]
    for folder in FOLDERS.values():
        shutil.copytree(GOLDEN / "images", root / folder / "images")
        (root / folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A run of four tasks as it is published: one folder for each stage."""
    for name in CHAIN:
        shutil.copytree(GOLDEN / "checkpoints" / name, tmp_path / "published" / RUN / name)
    return tmp_path / "published"


@pytest.fixture
def evaluate(golden_data: Path, tmp_path: Path) -> Evaluate:
    """Evaluates a folder of banks, under a configuration like the shipped ones."""
    settings = {
        "run": RUN,
        "output_dir": str(tmp_path / "runs"),
        "results_dir": str(tmp_path / "results"),
        "model": {"path": str(GOLDEN / "llava_med_tiny"), "dtype": "float32", "device": "cpu"},
        "data": {"root": str(golden_data)},
        "lora": {"rank": 4, "alpha": 8},
        "evaluation": {"max_new_tokens": 12, "batch_size": 8},
        "tasks": [{"name": name, "epochs": 1, "batch_size": 4, "learning_rate": 1e-4} for name in TASKS],
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    return lambda banks, *options: main(["evaluate", str(config), "--banks", str(banks), *options])


def answers(tmp_path: Path, task: str) -> dict[str, str]:
    lines = (tmp_path / "results" / RUN / task / "answer-file.jsonl").read_text().splitlines()
    return {row["question_id"]: row["text"] for row in map(json.loads, lines)}


def test_a_published_run_gives_the_golden_generations(evaluate: Evaluate, published: Path, tmp_path: Path) -> None:
    assert evaluate(published) == 0
    expected: dict[int, dict[str, str]] = {}
    for item in json.loads((GOLDEN / "generations.json").read_text()):
        expected.setdefault(item["banks"], {})[item["id"]] = item["text"]
    assert sorted(expected) == [1, 2, 3, 4]
    for number, task in enumerate(TASKS, 1):
        assert answers(tmp_path, task) == expected[number]
    cells = json.loads((tmp_path / "results" / RUN / "evaluation.json").read_text())["cells"]
    assert [cell["banks"] for cell in cells] == [list(TASKS[: number + 1]) for number in range(4)]


@pytest.mark.parametrize("spelling", [RUN, OTHER_SPELLING, ""])
@pytest.mark.parametrize("configured", [RUN, OTHER_SPELLING])
def test_a_run_is_found_under_either_spelling_and_by_itself(
    spelling: str, configured: str, evaluate: Evaluate, published: Path
) -> None:
    (published / RUN).rename(published / "moved")
    place = (published / "moved").rename(published / spelling) if spelling else published / "moved"
    options = (f"run={configured}", "evaluation.max_new_tokens=1", "--task", "pathvqa")
    assert evaluate(published if spelling else place, *options) == 0


def test_a_chain_may_end_before_the_stream_does(evaluate: Evaluate, published: Path, tmp_path: Path) -> None:
    for name in CHAIN[2:]:
        shutil.rmtree(published / RUN / name)
    assert evaluate(published, "evaluation.max_new_tokens=1") == 0
    assert {folder.name for folder in (tmp_path / "results" / RUN).iterdir() if folder.is_dir()} == set(TASKS[:2])


def test_banks_of_their_own_need_no_chain(evaluate: Evaluate, published: Path, tmp_path: Path) -> None:
    """`each` names a folder by its one task, and does not need the tasks before."""
    (published / RUN / CHAIN[2]).rename(published / RUN / "derm")
    assert evaluate(published, "method=each", "evaluation.max_new_tokens=1") == 0
    [pathvqa, derm] = json.loads((tmp_path / "results" / RUN / "evaluation.json").read_text())["cells"]
    assert (pathvqa["banks"], derm["banks"]) == (["pathvqa"], ["derm"])


# --- refused -------------------------------------------------------------------------------------------------------


def test_a_hole_is_refused(evaluate: Evaluate, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(published / RUN / CHAIN[1])
    assert evaluate(published) == 1
    message = capsys.readouterr().err
    assert f"the chain has a hole: {CHAIN[1]} is missing, though {CHAIN[3]} is there" in message


def test_another_rank_is_refused(evaluate: Evaluate, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(published, "lora.rank=64", "lora.alpha=64") == 1
    message = capsys.readouterr().err
    assert (
        "rank 4 and alpha 8, but the configuration says rank 64 and alpha 64; set lora.rank and lora.alpha" in message
    )


def test_one_bank_of_another_rank_is_refused(
    evaluate: Evaluate, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration says one rank, its matrices have another."""
    file = published / RUN / CHAIN[1] / "cl_lora.bin"
    stored = torch.load(file, weights_only=True)
    torch.save({key: tensor[:2] if key.endswith("A") else tensor[:, :2] for key, tensor in stored.items()}, file)
    assert evaluate(published) == 1
    assert f"{file}: model.language_model.layers.0." in capsys.readouterr().err


def test_a_folder_without_banks_is_refused(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "nowhere") == 1
    assert "no bank of this stream; looked for pathvqa/cl_lora.bin and banks/NAME" in capsys.readouterr().err


def test_banks_of_another_model_are_refused(
    evaluate: Evaluate, published: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(published, f"model.path={tiny_model}") == 1
    assert "model.language_model.layers.0.mlp.down_proj is 24 × 64, the model's" in capsys.readouterr().err
