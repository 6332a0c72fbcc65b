"""Published checkpoint folders are evaluated as they are, or imported, through the command line, on the golden model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.utils.files import file_digest
from tests.conftest import GOLDEN, bank_bytes

TASKS = ("pathvqa", "slake-vqarad", "derm", "PCAM")
SEQUENCE = ["_".join(TASKS[: number + 1]) for number in range(len(TASKS))]
FOLDERS = {"pathvqa": "PathVQA", "slake-vqarad": "Slake-VQARad", "derm": "Fitzpatrick", "PCAM": "PCam"}
RUN = "finetune_lora_MSLoRA-CR-ORTHO-64-64_llava_med_v1.5"
OTHER_SPELLING = RUN.replace("finetune_lora_MSLoRA", "finetune_MSLoRA")

Evaluate = Callable[..., int]


@pytest.fixture(scope="module")
def golden_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden record with an image as a training record and as a question of each task."""
    root = tmp_path_factory.mktemp("golden")
    records = [record for record in json.loads((GOLDEN / "conversations.json").read_text()) if "image" in record]
    rows = [
        {"question_id": record["id"], "image": record["image"], "text": record["conversations"][0]["value"]}
        | {"gt": "yes", "answer_type": "OPEN"}
        for record in records
    ]
    for folder in FOLDERS.values():
        shutil.copytree(GOLDEN / "images", root / folder / "images")
        (root / folder / "train.json").write_text(json.dumps(records))
        (root / folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A run of four tasks as it is published: one folder for each stage."""
    for name in SEQUENCE:
        shutil.copytree(GOLDEN / "checkpoints" / name, tmp_path / "published" / RUN / name)
    return tmp_path / "published"


@pytest.fixture
def config(golden_data: Path, tmp_path: Path) -> Path:
    """A configuration like the shipped ones."""
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
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def evaluate(config: Path) -> Evaluate:
    """Evaluates a folder of banks."""
    return lambda banks, *options: main(["evaluate", str(config), "--banks", str(banks), *options])


@pytest.fixture
def take(config: Path) -> Evaluate:
    """Imports a folder of banks."""
    return lambda banks, *options: main(["bank", "import", str(config), "--from", str(banks), *options])


def answers(tmp_path: Path, task: str, results: str = "results") -> dict[str, str]:
    lines = (tmp_path / results / RUN / task / "answer-file.jsonl").read_text().splitlines()
    return {row["question_id"]: row["text"] for row in map(json.loads, lines)}


def ledger(tmp_path: Path, run: str = RUN) -> dict[str, Any]:
    return json.loads((tmp_path / "runs" / run / "ledger.json").read_text())["tasks"]


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
    for name in SEQUENCE[2:]:
        shutil.rmtree(published / RUN / name)
    assert evaluate(published, "evaluation.max_new_tokens=1") == 0
    assert {folder.name for folder in (tmp_path / "results" / RUN).iterdir() if folder.is_dir()} == set(TASKS[:2])


def test_banks_of_their_own_need_no_chain(evaluate: Evaluate, published: Path, tmp_path: Path) -> None:
    """`each` names a folder by its one task, and does not need the tasks before."""
    (published / RUN / SEQUENCE[2]).rename(published / RUN / "derm")
    assert evaluate(published, "method=each", "evaluation.max_new_tokens=1") == 0
    [pathvqa, derm] = json.loads((tmp_path / "results" / RUN / "evaluation.json").read_text())["cells"]
    assert (pathvqa["banks"], derm["banks"]) == (["pathvqa"], ["derm"])


# --- imported into a run folder --------------------------------------------------------------------------------------


def test_imported_banks_are_finished_tasks(
    evaluate: Evaluate,
    take: Evaluate,
    config: Path,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything that reads a run folder reads them: evaluation without `--banks`, training, analysis, report."""
    assert take(published) == 0
    assert f"{tmp_path / 'runs' / RUN}: imported {', '.join(TASKS)}" in capsys.readouterr().out
    for name, entry in zip(SEQUENCE, ledger(tmp_path).values(), strict=True):
        file = published / RUN / name / "cl_lora.bin"
        assert entry["imported"] == {"path": str(file), "sha256": file_digest(file)}
    assert evaluate(published) == 0
    assert main(["evaluate", str(config), f"results_dir={tmp_path / 'own'}"]) == 0
    for task in TASKS:
        assert answers(tmp_path, task, "own") == answers(tmp_path, task)
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
    assert capsys.readouterr().err.count("already done, skipped") == len(TASKS)
    assert main(["analyze", str(config), "--questions", "2"]) == 0
    assert main(["report", str(config)]) == 0
    assert (tmp_path / "results" / RUN / "report.md").read_text().count("| imported |") == len(TASKS)


def test_what_is_imported_is_not_imported_again(
    take: Evaluate, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take(published) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("banks/*/*")}
    entries = ledger(tmp_path)
    assert take(published) == 0
    assert "nothing to import" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("banks/*/*")} == files
    assert ledger(tmp_path) == entries

    assert take(tmp_path / "runs" / RUN, "run=other") == 0  # from a run folder of this project
    assert {name: entry["digest"] for name, entry in ledger(tmp_path, "other").items()} == {
        name: entry["digest"] for name, entry in entries.items()
    }


def test_the_next_task_trains_on_imported_banks(
    take: Evaluate, config: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(published / RUN / SEQUENCE[3])
    assert take(published) == 0
    imported = bank_bytes(tmp_path / "runs" / RUN)
    assert list(imported) == sorted(TASKS[:3])
    frozen: list[list[str]] = []
    set_frozen = BankStack.set_frozen
    monkeypatch.setattr(
        BankStack,
        "set_frozen",
        lambda self, banks, **how: (frozen.append([bank.name for bank in banks]), set_frozen(self, banks, **how))[1],
    )
    assert main(["train", str(config), "training.logging_steps=1"]) == 0
    assert frozen == [list(TASKS[:3])]
    after = bank_bytes(tmp_path / "runs" / RUN)
    assert {name: after[name] for name in imported} == imported and "PCAM" in after
    [row] = map(json.loads, (tmp_path / "runs" / RUN / "logs" / "PCAM.jsonl").read_text().splitlines()[-1:])
    assert row["contrastive"] > 0
    assert [entry.get("imported") is not None for entry in ledger(tmp_path).values()] == [True, True, True, False]


@pytest.mark.parametrize("first", ["fit", "import"])
def test_imported_banks_are_routed_to_once_the_router_is_fitted(
    first: str, take: Evaluate, config: Path, published: Path
) -> None:
    """Before or after the import: what is fitted before stays."""
    if first == "import":
        assert take(published) == 0
    assert main(["bank", "fit-router", str(config)]) == 0
    assert take(published) == 0
    assert main(["evaluate", str(config), "--banks-by", "routed", "evaluation.max_new_tokens=1"]) == 0


def test_another_bank_of_a_finished_task_is_not_imported(
    take: Evaluate, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take(published) == 0
    before = ledger(tmp_path)
    file = published / RUN / SEQUENCE[1] / "cl_lora.bin"
    stored = torch.load(file, weights_only=True)
    torch.save({key: 2 * tensor for key, tensor in stored.items()}, file)
    assert take(published) == 1
    assert "task 'slake-vqarad' is finished with another bank" in capsys.readouterr().err
    assert ledger(tmp_path) == before


@pytest.mark.parametrize("method", ["mslora_cr", "sequential"])
def test_a_chain_with_a_hole_is_not_imported(
    method: str, take: Evaluate, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(published / RUN / SEQUENCE[1])
    assert take(published, f"method={method}") == 1
    assert "the sequence of banks has a gap" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_banks_of_another_model_or_without_what_the_method_keeps_are_not_imported(
    take: Evaluate, published: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take(published, f"model.path={tiny_model}") == 1
    message = capsys.readouterr().err
    assert "its layers are not those of the base model" in message
    assert "model.language_model.layers.0.mlp.down_proj is 24 × 64, the model's" in message
    assert take(published, "method=ewc") == 1
    assert "method ewc stores more of a task than its bank" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_banks_that_are_known_to_be_of_another_base_are_refused(
    take: Evaluate,
    evaluate: Evaluate,
    config: Path,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A ledger tells it, an exported bank, and an adapter's configuration that names a folder."""
    other = tmp_path / "llava_med_tiny"
    shutil.copytree(GOLDEN / "llava_med_tiny", other)
    shutil.copytree(GOLDEN / "clip-tiny-patch14", tmp_path / "clip-tiny-patch14")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")  # another digest
    assert take(published) == 0
    assert main(["bank", "export", str(config), "--output", str(tmp_path / "exported")]) == 0
    run = tmp_path / "runs" / RUN
    assert take(run, "run=second", f"model.path={other}") == 0  # nothing tells what published banks were trained on
    adapter = run / "banks" / "pathvqa" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": str(other)}))
    content = json.loads((run / "ledger.json").read_text())
    content["tasks"]["pathvqa"]["model_digest"] = "that of another"
    (run / "ledger.json").write_text(json.dumps(content))
    capsys.readouterr()
    foreign = tmp_path / "foreign" / "banks"
    shutil.copytree(run / "banks", foreign)
    for banks, changed in ((run, ()), (tmp_path / "exported", (f"model.path={other}",)), (foreign.parent, ())):
        for command in (take, evaluate):
            assert command(banks, "run=third", *changed) == 1
            assert "was trained on a base model of other content than that in" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "third").exists()


def test_an_export_is_imported_under_any_name_of_the_run(
    take: Evaluate, config: Path, published: Path, tmp_path: Path
) -> None:
    assert take(published) == 0
    assert main(["bank", "export", str(config), "--output", str(tmp_path / "exported")]) == 0
    for name, folder in (("by_parent", tmp_path / "exported"), ("by_itself", tmp_path / "exported" / RUN)):
        assert take(folder, f"run={name}") == 0
        assert {task: entry["digest"] for task, entry in ledger(tmp_path, name).items()} == {
            task: entry["digest"] for task, entry in ledger(tmp_path).items()
        }


def test_only_what_the_method_trains_is_imported(
    take: Evaluate, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, task in zip(SEQUENCE[1:], TASKS[1:], strict=True):
        (published / RUN / name).rename(published / RUN / task)
    assert take(published, "run=joint", "method=joint") == 0
    assert list(ledger(tmp_path, "joint")) == ["pathvqa"]
    assert take(published, "run=none", "method=zero_shot") == 1
    assert "method zero_shot has no banks" in capsys.readouterr().err
    assert take(published, "run=mixed", "method=moe_lora") == 1
    assert "its bank is plain LoRA, but method moe_lora trains a mixture of" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "none").exists() and not (tmp_path / "runs" / "mixed").exists()


def test_what_the_method_keeps_comes_along_from_a_run_folder(take: Evaluate, published: Path, tmp_path: Path) -> None:
    assert take(published, "run=first", "method=sequential") == 0
    for name in TASKS:
        save_file({"fisher": torch.ones(1)}, tmp_path / "runs" / "first" / "banks" / name / "memory.safetensors")
    assert take(tmp_path / "runs" / "first", "method=ewc") == 0
    for name, entry in ledger(tmp_path).items():
        assert entry["memory_digest"] == file_digest(tmp_path / "runs" / RUN / "banks" / name / "memory.safetensors")


def test_a_run_of_another_configuration_is_not_imported_into(
    take: Evaluate, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take(published) == 0
    path = tmp_path / "runs" / RUN / "ledger.json"
    content = json.loads(path.read_text())
    content["tasks"]["pathvqa"]["config_digest"] = "that of another"  # as if it had been trained there
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert take(published, "data.max_length=100") == 1
    message = capsys.readouterr().err
    assert "was made with another configuration (data.max_length: 2048 there, 100 here)" in message
    assert "Import into another `run`" in message and "--force" not in message


# --- exported ------------------------------------------------------------------------------------------------------


def test_nothing_to_export_and_no_base_model_are_said(
    take: Evaluate, config: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["bank", "export", str(config), "--output", str(tmp_path / "exported")]
    assert main(export) == 1
    assert f"no task of this run is trained yet in {tmp_path / 'runs' / RUN}" in capsys.readouterr().err
    assert take(published) == 0
    assert main([*export, f"model.path={tmp_path / 'nowhere'}"]) == 1
    assert f"{tmp_path / 'nowhere'}: no such folder; set model.path" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


# --- refused -------------------------------------------------------------------------------------------------------


def test_a_hole_is_refused(evaluate: Evaluate, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(published / RUN / SEQUENCE[1])
    assert evaluate(published) == 1
    message = capsys.readouterr().err
    assert f"the sequence of banks has a gap: {SEQUENCE[1]} is missing, though {SEQUENCE[3]} is there" in message


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
    file = published / RUN / SEQUENCE[1] / "cl_lora.bin"
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
