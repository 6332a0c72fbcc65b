"""Validation while a task trains: what it measures, that it moves nothing, which bank it keeps, when it stops."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.data.records import DataError, TrainingRecords
from mslora_cr.data.records import TestRecords as Questions
from mslora_cr.data.tasks import task_folder, training_records, validation_records
from mslora_cr.evaluation.evaluate import evaluate
from mslora_cr.models.llava_med import load
from mslora_cr.stream.train import train
from mslora_cr.stream.validation import validated_tasks
from mslora_cr.tuning.validation_root import make_validation_root
from tests.conftest import ConfigWriter, bank_bytes, once, write_config
from tests.helpers.killing import KillPoint, run_until_killed
from tests.training.test_trainer import make_trainer

ONE = ("tasks=[pathvqa]", "data.validation=0.25", "training.lr_scheduler_type=constant")
EACH_STEP = ("training.eval_strategy=steps", "training.eval_steps=1", "data.validation_questions=3")
HIGHEST = (*EACH_STEP, "training.keep=best", "training.greater_is_better=true")
"""The loss falls, so the highest one is that of the first validation."""
STOPPING = (*HIGHEST, "training.patience=2", "training.save_steps=1", "tasks.*.epochs=2")
"""After two more validations, at step 3 of 6."""


def entry_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "ledger.json").read_text())["tasks"]["pathvqa"]


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "pathvqa.jsonl").read_text().splitlines()]


def launched(config_file: ConfigWriter, run: str, *overrides: str, **changes: Any) -> Path:
    """The run folder of one more run of one task."""
    path = config_file(run=run, **changes)
    assert main(["train", str(path), *ONE, *overrides]) == 0
    return load_config(path).run_dir


@pytest.fixture(scope="module")
def stopped(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Path:
    """The run folder of `STOPPING`, never killed."""

    def build(folder: Path) -> None:
        assert main(["train", str(write_config(folder, tiny_settings)), *ONE, *STOPPING]) == 0

    return once(shared_tmp / "stopped-early", build) / "checkpoints" / "tiny"


def test_the_loss_is_that_of_all_answers_tokens(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(load(tiny_model, dtype=torch.float32), tiny_data, tmp_path)
    batch = trainer.data_collator([trainer.samples[index] for index in range(len(trainer.samples))])
    labels = batch.pop("labels")
    del batch["record_index"]
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    for batch_size in (3, 16):
        assert trainer.passes.mean_loss(batch_size) == pytest.approx(expected.item(), rel=1e-5)


def test_measuring_moves_nothing_and_gives_the_scores_of_evaluate(config_file: ConfigWriter, tmp_path: Path) -> None:
    """Dropout draws from the random state at every step; the bank is the same byte for byte. The validation questions
    are the test questions of `root`, so that `evaluate` finds what training logs last."""
    make_validation_root(load_config(config_file()), tmp_path / "root", 0.25)
    ours = ["tasks=[pathvqa]", f"data.root={tmp_path / 'root'}", "training.eval_steps=1"]
    plain, measured = (
        load_config(config_file(run=name), [*ours, f"training.eval_strategy={strategy}"])
        for name, strategy in (("plain", "no"), ("measured", "steps"))
    )
    train(plain)
    train(measured)
    assert bank_bytes(measured.run_dir) == bank_bytes(plain.run_dir)
    assert not any("eval_loss" in row for row in logged(plain.run_dir))
    figures = [row for row in logged(measured.run_dir) if "eval_loss" in row]
    assert [row["step"] for row in figures] == list(range(1, entry_of(measured.run_dir)["steps"] + 1))
    assert figures[-1]["eval_loss"] < figures[0]["eval_loss"]
    assert entry_of(measured.run_dir)["kept_step"] is None
    found = json.loads(evaluate(measured).read_text())["cells"][0]["metrics"]
    scores = {name.removeprefix("eval_"): value for name, value in figures[-1].items() if name.startswith("eval_")}
    del scores["loss"]
    assert {name: found[name] for name in scores} == {name: pytest.approx(value) for name, value in scores.items()}
    assert {"exact match score", "close accuracy"} <= scores.keys()


def test_the_best_bank_is_kept(config_file: ConfigWriter, stopped: Path) -> None:
    """The bank of the first of three steps is that of a run of one step."""
    entry = entry_of(stopped)
    assert (entry["kept_step"], entry["steps"]) == (1, 3)
    assert entry["validation"]["eval_loss"] == max(row.get("eval_loss", 0) for row in logged(stopped))
    assert bank_bytes(stopped) == bank_bytes(launched(config_file, "first", "tasks.*.epochs=0.3"))


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(KillPoint("mslora_cr.stream.train:save_bank"), id="after it has stopped"),
        pytest.param(
            KillPoint("mslora_cr.training.checkpoints:replace_folder", call=2, after=True),
            id="between two validations",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_killed_run_with_other_test_questions_keeps_the_same_bank_and_stops_at_the_same_step(
    point: KillPoint, config_file: ConfigWriter, stopped: Path, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(tiny_settings["data"]["root"], tmp_path / "other")
    for file in (tmp_path / "other").glob("*/test.jsonl"):
        rows = [json.loads(line) | {"gt": "other", "answer_type": "OPEN"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    elsewhere = {**tiny_settings["data"], "root": str(tmp_path / "other")}
    command = ["train", str(config_file(data=elsewhere)), *ONE, *STOPPING]
    run_until_killed(command, point, tmp_path / "output")
    assert main(command) == 0
    run = load_config(tmp_path / "run.yaml").run_dir
    assert bank_bytes(run) == bank_bytes(stopped)
    assert [row["step"] for row in logged(run)] == [1, 1, 2, 2, 3, 3]
    assert {name: entry_of(run)[name] for name in ("steps", "kept_step")} == {"steps": 3, "kept_step": 1}


def test_held_out_records_are_not_trained_on(config_file: ConfigWriter) -> None:
    config = load_config(config_file(), ["data.validation=0.25", "data.validation_questions=3"])
    task = config.stream[0]
    everything = TrainingRecords(task_folder(config, task) / "train.json")
    trained, held_out = training_records(config, task), validation_records(config, task)
    assert held_out is not None and held_out.available == len(everything) - len(trained) > 0
    assert len(held_out.questions) == len(held_out.conversations) == 3
    assert not {name for record in trained for name in record.images} & {
        name for record in held_out.questions for name in record.images
    }
    assert trained.digest != trained.file_digest == everything.digest
    assert [everything[int(trained.location(index).split()[-1])] for index in range(len(trained))] == list(trained)
    assert [question.gt for question in held_out.questions] == [one.turns[1].text for one in held_out.conversations]


def test_a_val_jsonl_is_measured_and_takes_no_training_record(
    config_file: ConfigWriter, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(tiny_settings["data"]["root"], tmp_path / "data")
    folder = tmp_path / "data" / "PathVQA"
    shutil.copyfile(folder / "test.jsonl", folder / "val.jsonl")
    config = load_config(config_file(data={"root": str(tmp_path / "data"), "validation": 0.25}))
    task = config.stream[0]
    records = validation_records(config, task)
    assert records is not None
    assert len(training_records(config, task)) == len(TrainingRecords(folder / "train.json"))
    assert list(records.questions) == list(Questions(folder / "test.jsonl"))
    first = records.conversations[0]
    assert first.turns[0].text == f"<image>\n{records.questions[0].text}" and first.turns[1].text == "no"


def test_what_cannot_be_measured_is_refused_before_training(
    config_file: ConfigWriter, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    path = config_file()
    with pytest.raises(DataError, match=r"pathvqa has nothing to validate on: .* set data.validation=0.1"):
        train(load_config(path, ["training.keep=best"]))
    metric = ["data.validation=0.25", "training.keep=best", "training.metric_for_best_model=accuracy"]
    with pytest.raises(ConfigError, match=r"'accuracy', of which .* give no figure; there are loss, exact match score"):
        train(load_config(path, metric))
    (tmp_path / "PathVQA").mkdir()
    rows = json.loads((Path(tiny_settings["data"]["root"]) / "PathVQA" / "train.json").read_text())
    (tmp_path / "PathVQA" / "train.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(DataError, match=r"data.validation=0.5 holds out 0 of 1 records and leaves 1 to train on"):
        train(load_config(path, ["data.validation=0.5", f"data.root={tmp_path}"]))


def test_whose_records_are_measured(config_file: ConfigWriter) -> None:
    """A task's own; all tasks' where one bank is trained on all at once."""
    for method, expected in (("replay", ["slake-vqarad"]), ("joint", ["pathvqa", "slake-vqarad", "PCAM"])):
        config = load_config(config_file(method=method, regularization={}))
        assert [task.name for task in validated_tasks(config, config.stream[1])] == expected
