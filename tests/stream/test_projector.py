"""A run that trains the projector with every bank, through the command line."""

import json
from pathlib import Path

import pytest

from mslora_cr.api import load
from mslora_cr.banks.io import load_bank
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.data.records import TrainingRecords
from mslora_cr.data.tasks import training_records
from mslora_cr.models.shapes import projector_size
from mslora_cr.stream.checks import check_projector
from mslora_cr.stream.plan import plan
from tests.conftest import ConfigWriter, bank_bytes
from tests.helpers.killing import KillPoint, run_until_killed
from tests.serving.test_export import elsewhere

TWO = "tasks=[pathvqa, slake-vqarad]"
TRAINED = {"rank": 4, "alpha": 8, "dropout": 0.05, "projector_learning_rate": 0.01}


def test_killed_resumed_answered_and_exported(config_file: ConfigWriter, tmp_path: Path) -> None:
    """Byte-identical after a kill; every question is answered with its task's projector, here and in PEFT."""
    whole = ["train", str(config_file(run="whole", method="mr_lora", lora=TRAINED)), TWO]
    assert main(whole) == 0
    command = ["train", str(config_file(run="again", method="mr_lora", lora=TRAINED)), TWO]
    point = KillPoint("mslora_cr.training.callbacks:JsonLinesCallback.on_log", call=8, after=True)
    run_until_killed(command, point, tmp_path / "output")
    assert main(command) == 0
    folder = tmp_path / "checkpoints" / "again"
    assert bank_bytes(folder) == bank_bytes(tmp_path / "checkpoints" / "whole")

    config = load_config(tmp_path / "run.yaml", [TWO])
    banks = {task.name: load_bank(folder / "banks" / task.name) for task in config.stream}
    _, parameters = plan(config)
    size = projector_size(Path(config.model.path))
    for bank in banks.values():
        assert sum(tensor.numel() for tensor in bank.projector.values()) == size
        assert sum(tensor.numel() for tensor in bank.tensors) == parameters
    assert any(bool((a != b).any()) for a, b in zip(*(bank.projector.values() for bank in banks.values()), strict=True))

    prefixed, routed = (str(tmp_path / name) for name in ("own", "routed"))
    evaluate = ["evaluate", str(tmp_path / "run.yaml"), TWO, "--stages", "final"]
    assert main([*evaluate, "--banks-by", "prefix", f"results_dir={prefixed}"]) == 0
    assert main([*evaluate, f"results_dir={routed}"]) == 0
    model, compared = load(tmp_path / "run.yaml", overrides=[TWO]), 0
    cases, ids = [], []
    for task in config.stream:
        data = Path(config.data.root) / task.folder
        rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
        aware = [
            json.loads(line)
            for line in Path(prefixed, "again", task.name, "answer-file.jsonl").read_text().splitlines()
        ]
        lines = Path(routed, "again", "routed", task.name, "stage-2", "answer-file.jsonl").read_text().splitlines()
        for answer, line in zip(aware, map(json.loads, lines), strict=True):
            if line["metadata"]["routed_to"] == task.name:
                assert line["text"] == answer["text"]
                compared += 1
        image = str(data / rows[0]["image"])
        asked = model.ask(image, rows[0]["text"], task=task.name)
        assert asked.text == aware[0]["text"]
        ids.append(list(asked.ids))
        place = {"model": str(tmp_path / "peft" / "base"), "adapter": str(tmp_path / "peft" / task.name)}
        cases.append({**place, "images": [image], "question": rows[0]["text"], "tokens": 4})
    assert compared > 4
    assert (
        main(["export", str(tmp_path / "run.yaml"), TWO, "--output", str(tmp_path / "peft"), "--format", "peft"]) == 0
    )
    settings = json.loads((tmp_path / "peft" / "pathvqa" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["multi_modal_projector"]
    assert elsewhere(cases, tmp_path) == ids


def test_the_next_task_goes_on_with_the_projector_and_needs_the_option(
    config_file: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config_file(method="sequential", lora={**TRAINED, "projector_learning_rate": 1e-9}))
    assert main(["train", path, TWO]) == 0
    first, second = (
        load_bank(tmp_path / "checkpoints" / "tiny" / "banks" / name) for name in ("pathvqa", "slake-vqarad")
    )
    assert all((first.projector[name] - second.projector[name]).abs().max() < 1e-6 for name in first.projector)
    summed = str(config_file(run="summed", method="incremental", lora={**TRAINED, "projector_learning_rate": None}))
    source = str(tmp_path / "checkpoints" / "tiny")
    assert main(["bank", "import", summed, TWO, "--from", source]) == 1
    assert "method incremental sums banks" in capsys.readouterr().err
    path = str(config_file(method="sequential", lora={**TRAINED, "projector_learning_rate": 1e-9}))
    assert main(["train", path, "lora.projector_learning_rate=null", "--force"]) == 1
    assert "set lora.projector_learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mslora_cr", "lwf", "hide_llava", "inflora"])
def test_methods_that_sum_banks_refuse_it(method: str, config_file: ConfigWriter) -> None:
    with pytest.raises(ConfigError, match="projectors have no sum"):
        load_config(config_file(method=method), ["lora.projector_learning_rate=2e-5"])


def test_digests_without_it_are_those_from_before(config_file: ConfigWriter) -> None:
    config = load_config(config_file())
    assert "projector_learning_rate" not in config.model_dump()["lora"]
    assert (
        load_config(config_file(), ["lora.projector_learning_rate=null"]).training_digest() == config.training_digest()
    )
    trained = load_config(config_file(method="each"), ["lora.projector_learning_rate=2e-5"])
    assert trained.training_digest() != load_config(config_file(method="each")).training_digest()


def test_what_cannot_train_the_projector_exactly_is_refused(
    config_file: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(config_file(method="each", lora=TRAINED))
    records = {"pathvqa": training_records(config, config.task("pathvqa"))}
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW"}}), encoding="utf-8")
    check_projector(config, {}, records)
    with pytest.raises(ConfigError, match="has one learning rate"):
        check_projector(config, {"deepspeed": str(file)}, records)
    monkeypatch.setenv("RANK", "0")
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    check_projector(config, {"deepspeed": str(file)}, records)
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": turns}]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.json: some records have no picture"):
        check_projector(config, {"deepspeed": str(file)}, {"pathvqa": TrainingRecords(tmp_path / "train.json")})
