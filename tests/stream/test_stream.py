import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainingArguments

from mslora_cr.banks.io import load_bank
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.runs.ledger import Ledger
from mslora_cr.stream import train as stream
from mslora_cr.stream.checks import check_trainable
from mslora_cr.stream.plan import plan
from mslora_cr.stream.train import train
from mslora_cr.training.arguments import batch_shape, training_arguments
from mslora_cr.training.callbacks import JsonLinesCallback
from mslora_cr.training.trainer import BankTrainer
from tests.conftest import STEPS, ConfigWriter, bank_bytes
from tests.helpers.killing import KillPoint, run_until_killed

TASKS = list(STEPS)
TWO = "tasks=[pathvqa, slake-vqarad]"


def run_folder(config: Path) -> Path:
    return load_config(config).run_dir


# --- killed and started again --------------------------------------------------------------------------------------

LOG = "mslora_cr.training.callbacks:JsonLinesCallback.on_log"
POINTS = {
    "before the first checkpoint": KillPoint(LOG, call=1),
    "after a checkpoint": KillPoint(LOG, call=3),
    "in the second task, before its first checkpoint": KillPoint(LOG, call=6),  # on_log is also told the summary
    "in the second task, after a checkpoint": KillPoint(LOG, call=8, after=True),
    "while a checkpoint is written": KillPoint("mslora_cr.training.trainer:BankTrainer._save_rng_state"),
    "a second checkpoint complete, but not yet renamed": KillPoint(
        "mslora_cr.training.checkpoints:replace_folder", call=2
    ),
    "two checkpoints side by side": KillPoint("mslora_cr.training.checkpoints:replace_folder", call=2, after=True),
    "the bank written, but not yet renamed": KillPoint("mslora_cr.utils.files:replace_folder", call=3),
    "the bank saved, but not in the ledger": KillPoint("mslora_cr.stream.train:save_bank", after=True),
    "the ledger written, but not yet renamed": KillPoint("mslora_cr.runs.ledger:Path.replace", call=2),
    "in the ledger, checkpoints not yet removed": KillPoint("mslora_cr.runs.ledger:Ledger.enter", after=True),
    "between tasks": KillPoint("mslora_cr.stream.train:train_task", call=2),
}


FURTHER = {"before the first checkpoint", "after a checkpoint", "in the second task, before its first checkpoint"}
FURTHER |= {"two checkpoints side by side", "in the ledger, checkpoints not yet removed", "between tasks"}
FURTHER |= {"the bank saved, but not in the ledger", "while a checkpoint is written"}
"""Of which `make test` tries the neighbours."""


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, id=name, marks=[pytest.mark.long] if name in FURTHER else [])
        for name, point in POINTS.items()
    ],
)
def test_a_killed_run_ends_in_the_same_banks(
    point: KillPoint, config_file: ConfigWriter, trained_config: Path, tmp_path: Path
) -> None:
    command = ["train", str(config_file()), TWO]
    run_until_killed(command, point, tmp_path / "output")
    run = run_folder(tmp_path / "run.yaml")
    assert len(bank_bytes(run)) < 2
    assert main(command) == 0
    whole = bank_bytes(run_folder(trained_config))
    assert bank_bytes(run) == {name: whole[name] for name in ("pathvqa", "slake-vqarad")}
    assert not [path for path in run.rglob("*") if "tmp" in path.name or "checkpoint" in path.name]
    for name in ("pathvqa", "slake-vqarad"):
        assert [row["step"] for row in log_rows(run, name)] == [1, 2, 3, 4]
        ours, theirs = ledger_entry(run, name), ledger_entry(run_folder(trained_config), name)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(2, 8), (1.5, 6)],
    ids=["in the second epoch", "the last checkpoint written, inside an epoch"],
)
def test_a_run_killed_in_a_later_epoch_ends_in_the_same_bank(
    epochs: float, steps: int, config_file: ConfigWriter, tmp_path: Path
) -> None:
    point = KillPoint("mslora_cr.training.checkpoints:replace_folder", call=3, after=True)
    settings = ["tasks=[pathvqa]", f"tasks.*.epochs={epochs}", "training.lr_scheduler_type=constant"]
    whole = run_folder(config_file(run="whole"))
    assert main(["train", str(tmp_path / "run.yaml"), *settings]) == 0
    command = ["train", str(config_file()), *settings]
    run_until_killed(command, point, tmp_path / "output")
    run = run_folder(tmp_path / "run.yaml")
    assert (run / "work" / "pathvqa" / "checkpoint-6").is_dir()
    assert main(command) == 0
    assert bank_bytes(run) == bank_bytes(whole)
    assert [row["step"] for row in log_rows(run, "pathvqa")] == list(range(1, steps + 1))
    assert ledger_entry(run, "pathvqa")["steps"] == steps


@pytest.mark.long
def test_kill_9_from_outside(config_file: ConfigWriter) -> None:
    """As a user does it: two launches of one command, the first killed inside the second task."""
    longer = "tasks.slake-vqarad.epochs=6"
    whole = config_file(run="whole")
    assert main(["train", str(whole), TWO, longer]) == 0
    expected = bank_bytes(run_folder(whole))
    command = [sys.executable, "-m", "mslora_cr", "train", str(config_file()), TWO, longer]
    run = run_folder(Path(command[4]))
    output = run.parent / "output"
    process = subprocess.Popen(command, stdout=output.open("w"), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not any((run / "work" / "slake-vqarad").glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    said = again.stdout + again.stderr
    assert "pathvqa: already done, skipped" in said
    assert re.search(r"slake-vqarad: resumes after step (\d+), from \S+/work/slake-vqarad/checkpoint-\1\n", said)
    assert re.search(r"slake-vqarad: 24 steps in \d+ s, mean loss \d+\.\d{4}; bank: \S+/banks/slake-vqarad\n", said)
    assert f"next: mslora-cr evaluate {command[4]}" in said
    assert bank_bytes(run) == expected


def log_rows(run: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / f"{task}.jsonl").read_text().splitlines()]


def ledger_entry(run: Path, task: str) -> dict[str, Any]:
    return json.loads((run / "ledger.json").read_text())["tasks"][task]


# --- a whole run ---------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(trained_config: Path) -> None:
    config = load_config(trained_config)
    run = config.run_dir
    assert {path.name for path in run.iterdir()} == {"banks", "logs", "config.yaml", "ledger.json", "work"}
    assert not list((run / "work").iterdir())
    ledger = json.loads((run / "ledger.json").read_text())
    assert list(ledger["tasks"]) == TASKS
    for name, entry in ledger["tasks"].items():
        assert entry["steps"] == STEPS[name]
        assert json.loads((run / "banks" / name / "bank.json").read_text())["sha256"] == entry["digest"]
    assert {"torch", "transformers", "peft", "python"} <= ledger["versions"].keys()
    assert ledger["config_digest"] == config.training_digest()
    assert load_config(run / "config.yaml") == config  # the resolved configuration can be run again


def test_each_term_is_logged(trained_config: Path) -> None:
    config = load_config(trained_config)
    for name, steps in STEPS.items():
        rows = log_rows(config.run_dir, name)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        for row in rows:
            if name == "pathvqa":  # the first task: cross entropy alone
                assert not {"contrastive", "orthogonality", "alpha", "beta"} & row.keys()
                assert row["loss"] == pytest.approx(row["ce"], rel=1e-5)
            else:
                parts = row["ce"] + row["alpha"] * row["contrastive"] + row["beta"] * row["orthogonality"]
                assert row["loss"] == pytest.approx(parts, rel=1e-5)
                assert row["beta"] == 0.01
    learned = [row["alpha"] for row in log_rows(config.run_dir, "PCAM")]
    assert learned[0] == pytest.approx(0.010052, rel=1e-3)  # exp(-4.6)
    assert learned == sorted(learned, reverse=True) and learned[-1] < learned[0]  # the term is positive


def test_tensorboard_and_wandb_get_a_run_per_task_that_the_next_launch_continues(
    config_file: ConfigWriter, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    training = {**tiny_settings["training"], "report_to": ["tensorboard", "wandb"]}
    config = config_file(training=training)
    written = JsonLinesCallback.on_log

    def stop(callback: JsonLinesCallback, *args: Any, **kwargs: Any) -> None:
        written(callback, *args, **kwargs)
        if callback.path.stem == "slake-vqarad" and args[1].global_step == 3:  # its checkpoint is behind step 2
            raise OSError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(JsonLinesCallback, "on_log", stop)
        assert main(["train", str(config), TWO]) == 1
    assert main(["train", str(config), TWO]) == 0
    launches = sorted(path.stem.removeprefix("run-") for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    content = json.loads((run_folder(config) / "logs" / "trackers.json").read_text())["wandb"]
    assert launches == sorted([content["pathvqa"], content["slake-vqarad"], content["slake-vqarad"]])
    assert len(set(launches)) == 2
    for task in ("pathvqa", "slake-vqarad"):
        events = EventAccumulator(str(run_folder(config) / "logs" / "tensorboard" / task)).Reload()
        rows = log_rows(run_folder(config), task)
        for term in {"loss", "ce", "contrastive", "orthogonality", "alpha", "beta"} & rows[0].keys():
            logged = [(event.step, event.value) for event in events.Scalars(f"train/{term}")]
            assert logged == [(row["step"], pytest.approx(row[term])) for row in rows]


def test_finished_tasks_are_skipped(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_config.parent / "checkpoints", tmp_path / "checkpoints")
    before = bank_bytes(tmp_path / "checkpoints" / "tiny")
    monkeypatch.setattr(stream, "train_task", None)  # nothing may be trained
    assert main(["train", str(trained_config), f"output_dir={tmp_path / 'checkpoints'}"]) == 0
    said = capsys.readouterr().err
    assert [name for name in TASKS if f"{name}: already done, skipped" in said] == list(TASKS)
    assert bank_bytes(tmp_path / "checkpoints" / "tiny") == before


def test_one_launch_per_task(config_file: ConfigWriter, trained_config: Path) -> None:
    """`--task` by `--task` gives the banks of one launch, and a bank is not trained before those it builds on."""
    config = config_file()
    assert main(["train", str(config), TWO, "--task", "slake-vqarad"]) == 1
    for name in ("pathvqa", "slake-vqarad"):
        assert main(["train", str(config), TWO, "--task", name]) == 0
    whole = bank_bytes(run_folder(trained_config))
    assert bank_bytes(run_folder(config)) == {name: whole[name] for name in ("pathvqa", "slake-vqarad")}


def test_later_tasks_build_on_earlier_banks(config_file: ConfigWriter, trained_config: Path) -> None:
    """`each` trains every task from the base alone: the first bank is the same, the second is another."""
    config = config_file(method="each")
    assert main(["train", str(config), TWO]) == 0
    alone, stacked = bank_bytes(run_folder(config)), bank_bytes(run_folder(trained_config))
    assert alone["pathvqa"] == stacked["pathvqa"]
    assert alone["slake-vqarad"] != stacked["slake-vqarad"]
    assert "contrastive" not in log_rows(run_folder(config), "slake-vqarad")[0]


def test_sequential_goes_on_with_the_last_bank(config_file: ConfigWriter) -> None:
    config = config_file(method="sequential")
    settings = yaml.safe_load(config.read_text())
    settings["training"] = {"logging_steps": 1}
    settings["tasks"][1]["learning_rate"] = 1e-30  # so small that nothing moves: the start is seen
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config), TWO]) == 0
    first, second = (load_file(run_folder(config) / "banks" / n / "adapter_model.safetensors") for n in TASKS[:2])
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- refused before anything is trained ------------------------------------------------------------------------------


def test_a_run_folder_of_another_configuration_is_refused(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_config.parent / "checkpoints", tmp_path / "checkpoints")
    folder = f"output_dir={tmp_path / 'checkpoints'}"
    content = (tmp_path / "checkpoints" / "tiny" / "config.yaml").read_bytes()
    assert main(["train", str(trained_config), folder, "tasks.PCAM.epochs=3", "lora.dropout=0.1"]) == 1
    message = capsys.readouterr().err
    assert "made with another configuration" in message and "--force" in message
    assert "tasks.PCAM.epochs: 2.0 there, 3.0 here" in message and "lora.dropout: 0.05 there, 0.1 here" in message
    assert (tmp_path / "checkpoints" / "tiny" / "config.yaml").read_bytes() == content
    # What decides no weight may change, and --force goes on.
    monkeypatch.setattr(stream, "train_task", None)
    assert main(["train", str(trained_config), folder, "training.logging_steps=7", "evaluation.batch_size=2"]) == 0
    assert main(["train", str(trained_config), folder, "tasks.PCAM.epochs=3", "--force"]) == 0
    capsys.readouterr()
    assert (
        main(["train", str(trained_config), folder, "tasks.PCAM.epochs=3"]) == 1
    )  # not silenced by having been forced
    assert "was trained with other settings" in capsys.readouterr().err


def test_another_configuration_is_refused_before_images_are_decoded(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_config.parent / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.setattr(stream, "check_task_images", None)
    arguments = ["train", str(trained_config), f"output_dir={tmp_path / 'checkpoints'}", "lora.dropout=0.1"]
    assert main(arguments) == 1
    assert "made with another configuration" in capsys.readouterr().err


def test_a_stream_may_grow_behind_its_finished_tasks(
    trained_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_config.parent / "checkpoints", tmp_path / "checkpoints")
    trained: list[str] = []
    monkeypatch.setattr(stream, "train_task", lambda run, task: trained.append(task.name))
    ledger = tmp_path / "checkpoints" / "tiny" / "ledger.json"
    content = json.loads(ledger.read_text())
    del content["tasks"]["PCAM"]
    ledger.write_text(json.dumps(content))
    folder = f"output_dir={tmp_path / 'checkpoints'}"
    assert main(["train", str(trained_config), folder, "tasks.PCAM.epochs=3"]) == 0
    assert trained == ["PCAM"]


def test_a_checkpoint_of_other_settings_images_or_records_is_refused(
    config_file: ConfigWriter, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    command = ["train", str(config_file()), "tasks=[pathvqa]", f"data.root={data}"]
    published = KillPoint("mslora_cr.training.checkpoints:replace_folder", after=True)
    run_until_killed(command, published, tmp_path / "output")
    assert main([*command, "lora.dropout=0.1"]) == 1
    message = capsys.readouterr().err
    assert "checkpoint-2 was made with another configuration" in message and "--force continues" in message
    records = data / "PathVQA" / "train.json"
    image = records.parent / json.loads(records.read_text())[0]["image"]
    before = image.read_bytes()
    Image.new("RGB", (64, 64), "red").save(image)
    assert main(command) == 1
    assert "training images changed since" in capsys.readouterr().err
    image.write_bytes(before)
    records.write_text(json.dumps(json.loads(records.read_text())[1:]))
    assert main([*command, "--force"]) == 1  # of no use here, so not recommended
    message = capsys.readouterr().err
    assert "training records changed since" in message and "--force" not in message


def test_a_base_model_of_other_content_is_refused(
    trained_config: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_config.parent / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(tiny_model, tmp_path / "moved" / tiny_model.name)
    tower = json.loads((tiny_model / "config.json").read_text())["mm_vision_tower"]
    shutil.copytree(tiny_model / tower, (tmp_path / "moved" / tiny_model.name / tower).resolve(), dirs_exist_ok=True)
    model = tmp_path / "moved" / tiny_model.name
    command = ["train", str(trained_config), f"output_dir={tmp_path / 'checkpoints'}", f"model.path={model}"]
    assert main(command) == 0  # the same model in another place
    shard = sorted(model.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(command) == 1
    assert "was trained on a base model of other content" in capsys.readouterr().err


def test_a_damaged_ledger_is_named(config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file()
    run_folder(config).mkdir(parents=True)
    (run_folder(config) / "ledger.json").write_text("")
    assert main(["train", str(config)]) == 1
    assert "ledger.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "field", ["save_only_model=true", "eval_strategy=steps", "save_strategy=best", "fp16=true", "fsdp=full_shard"]
)
def test_what_a_run_cannot_keep_its_word_with_is_refused(
    field: str, config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file()
    assert main(["train", str(config), f"training.{field}"]) == 1
    assert f"training.{field.partition('=')[0]}" in capsys.readouterr().err
    assert not run_folder(config).exists()


def test_fp16_is_refused_for_penalties_alone(config_file: ConfigWriter) -> None:
    config = load_config(config_file(method="lwf"))  # what it adds is scaled with the loss
    check_trainable(config, {"fp16": True})
    with pytest.raises(ConfigError, match="instead of olora"):
        check_trainable(load_config(config_file(method="olora")), {"fp16": True})


def test_a_bank_that_bursts_is_not_finished(
    config_file: ConfigWriter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update makes the numbers infinite, so that no loss shows it."""

    def burst(trainer: BankTrainer, resume_from_checkpoint: str | None = None) -> None:
        trainer.state.global_step = 1
        with torch.no_grad():
            next(iter(trainer.stack.trainable().values()))[1].fill_(torch.inf)

    monkeypatch.setattr(BankTrainer, "train", burst)
    config = config_file()
    assert main(["train", str(config), "tasks=[pathvqa]"]) == 1
    assert "bank 'pathvqa' is not saved: 1 of its" in capsys.readouterr().err
    assert json.loads((run_folder(config) / "ledger.json").read_text())["tasks"] == {}


def test_a_penalty_that_is_not_finite_stops_before_anything_moves(
    config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file()
    assert main(["train", str(config), "tasks=[pathvqa, slake-vqarad]", "regularization.beta=1e38"]) == 1
    assert "the penalty at step 1 is inf; nothing was updated" in capsys.readouterr().err


def test_a_bank_that_changed_is_not_taken_for_the_recorded_one(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_config.parent / "checkpoints", tmp_path / "checkpoints")
    weights = tmp_path / "checkpoints" / "tiny" / "banks" / "pathvqa" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["train", str(trained_config), f"output_dir={tmp_path / 'checkpoints'}"]) == 1
    message = capsys.readouterr().err
    assert f"{weights} is not what the ledger records" in message and "'pathvqa'" in message


@pytest.fixture
def broken_data(tiny_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the data root, and the picture of the second task's record 3."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    records = json.loads((root / "Slake-VQARad" / "train.json").read_text())
    return root, root / "Slake-VQARad" / records[3]["image"]


@pytest.mark.parametrize("check", ["true", "false"])
def test_a_missing_image_is_named_before_training(
    check: str, broken_data: tuple[Path, Path], config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    root, picture = broken_data
    picture.unlink()
    config = config_file()
    assert main(["train", str(config), f"data.root={root}", f"data.check_images={check}"]) == 1
    message = capsys.readouterr().err
    assert "is missing" in message and picture.name in message and "record" in message
    assert not (run_folder(config) / "ledger.json").exists()  # so another configuration may start here


def test_a_corrupt_image_is_named_before_training(
    broken_data: tuple[Path, Path], config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    root, picture = broken_data
    picture.write_bytes(picture.read_bytes()[:200])
    config = config_file()
    assert main(["train", str(config), f"data.root={root}", "data.check_images=true"]) == 1
    message = capsys.readouterr().err
    assert "1 of 24 images cannot be read" in message
    assert re.search(rf"Slake-VQARad/train\.json: record \d+: .*{picture.name}: not a readable image", message)
    assert not (run_folder(config) / "logs").exists()


def test_an_image_outside_the_data_root_is_refused(
    broken_data: tuple[Path, Path], config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    root, picture = broken_data
    file = root / "Slake-VQARad" / "train.json"
    records = json.loads(file.read_text())
    (root.parent / "outside.png").write_bytes(picture.read_bytes())
    records[3]["image"] = "../../outside.png"
    file.write_text(json.dumps(records))
    assert main(["train", str(config_file()), f"data.root={root}"]) == 1
    message = capsys.readouterr().err
    assert "record 3" in message and "'../../outside.png'" in message


def test_malformed_records_are_refused_before_training(
    broken_data: tuple[Path, Path], config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = broken_data
    file = root / "Slake-VQARad" / "train.json"
    records = json.loads(file.read_text())
    del records[2]["conversations"][0]["value"]
    file.write_text(json.dumps(records))
    config = config_file()
    assert main(["train", str(config), f"data.root={root}"]) == 1
    message = capsys.readouterr().err
    assert f"{file}: record 2" in message and "value" in message
    assert not run_folder(config).exists()


# --- the plan ------------------------------------------------------------------------------------------------------


def test_the_plan_is_what_training_does(
    trained_config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = load_config(trained_config)
    plans, trainable = plan(config)
    assert [(item.task, item.steps, item.done) for item in plans] == [(name, STEPS[name], True) for name in TASKS]
    assert [item.frozen_banks for item in plans] == [TASKS[:0], TASKS[:1], TASKS[:2]]
    assert [item.penalties for item in plans] == [False, True, True]
    bank = load_bank(config.run_dir / "banks" / "PCAM")
    assert trainable == sum(matrix.numel() for pair in bank.matrices.values() for matrix in pair)

    assert main(["train", str(trained_config), f"output_dir={tmp_path / 'nowhere'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{trainable:,}" in printed and "to do" in printed and "dropout: 0.05" in printed
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("batch_size", "most", "expected"),
    [(24, None, (24, 1)), (24, 8, (8, 3)), (24, 9, (8, 3)), (7, 4, (1, 7)), (4, 9, (4, 1))],
)
def test_batch_shape(batch_size: int, most: int | None, expected: tuple[int, int], config_file: ConfigWriter) -> None:
    config = load_config(config_file(), [f"tasks.PCAM.batch_size={batch_size}"])
    fields = {} if most is None else {"per_device_train_batch_size": most}
    assert batch_shape(config.task("PCAM"), fields) == expected


def test_a_batch_that_the_processes_cannot_share_is_refused(
    config_file: ConfigWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = load_config(config_file())
    with pytest.raises(ConfigError, match=r"tasks\.PCAM\.batch_size is 4, which 3 processes cannot divide"):
        batch_shape(config.task("PCAM"), {})


@pytest.mark.parametrize(
    "fields",
    [
        {"lr_scheduler_type": "cosinee"},
        {"per_device_train_batch_size": 0},
        {"optim": "adamm"},
        {"report_to": "wandbb"},
        {"report_to": "clearml"},  # not installed here
        {"report_to": "flyte"},  # nor this one
    ],
)
def test_training_fields_that_transformers_refuses_are_an_error_of_the_user(
    fields: dict[str, Any], config_file: ConfigWriter
) -> None:
    with pytest.raises(ConfigError, match=f"training.*{next(iter(fields))}|{next(iter(fields.values()))}"):
        train(load_config(config_file(training=fields)))


def test_a_process_takes_one_gpu(config_file: ConfigWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher the Trainer would spread each batch over all GPUs, and multiply it by their number."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 1 if args._n_gpu == 1 else 8))
    config = load_config(config_file())
    args = training_arguments(config, config.task("PCAM"), {})
    assert args.train_batch_size == args.per_device_train_batch_size == 4


def test_a_gpu_that_is_not_there_is_an_error_of_the_user(
    config_file: ConfigWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", str(config_file()), "model.device=cuda"]) == 1
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_the_ledger_of_an_empty_folder(config_file: ConfigWriter) -> None:
    config = load_config(config_file())
    assert Ledger.read(config).tasks == {}
    assert not config.run_dir.exists()
