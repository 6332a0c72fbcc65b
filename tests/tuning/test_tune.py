"""`mslora-cr tune`: spaces, validation roots, and a small tuning through the command line."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import method_names
from mslora_cr.config.schema import ConfigError
from mslora_cr.data.tasks import test_records as questions_of
from mslora_cr.data.tasks import training_records
from mslora_cr.tuning.space import SPACES, read_space
from mslora_cr.tuning.study import JOURNAL, Plan, StudyPart, ask, best_trial, requeue_killed, studies, tune
from mslora_cr.tuning.validation_root import make_validation_root
from tests.conftest import ConfigWriter, write_config


def test_every_method_that_learns_ships_a_space(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    assert {path.stem for path in SPACES.glob("*.yaml")} == set(method_names()) - {"zero_shot"}
    for path in SPACES.glob("*.yaml"):
        space = read_space(path.stem)
        drawn = optuna.create_study().ask(space.distributions).params
        config = write_config(tmp_path / path.stem, tiny_settings, lora={"rank": 8, "alpha": 8})
        load_config(config, [f"method={path.stem}", *(f"{key}={value}" for key, value in drawn.items())])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{lora.rank: {low: 8, high: 4}}", "low 8 is above high 4"),
        ("{lora.rank: {low: 0, high: 4, log: true}}", "begins above 0"),
        ("{lora.rank: 4}", "give a list of values"),
        ("{tasks.PCAM.epochs: [1]}", "begins with tasks"),
        ("[]", "expected keys"),
    ],
)
def test_a_wrong_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_space(path)


def test_an_unknown_space_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'olora'"):
        read_space("olra")


def test_the_validation_root_has_no_test_question(config_file: ConfigWriter, tmp_path: Path) -> None:
    config = load_config(config_file())
    root = tmp_path / "root"
    make_validation_root(config, root, 0.25)
    tuned = config.model_copy(update={"data": config.data.model_copy(update={"root": str(root)})})
    for task in config.stream:
        before, after = training_records(config, task), training_records(tuned, task)
        asked = questions_of(tuned, task)
        assert 0 < len(before) - len(after) < len(before) / 2
        held_out = {name for question in asked for name in question.images}
        assert not held_out & {name for record in after for name in record.images}
        assert held_out <= {name for record in before for name in record.images}
    made = (root / "PCam" / "test.jsonl").stat().st_mtime_ns
    make_validation_root(config, root, 0.25)
    assert (root / "PCam" / "test.jsonl").stat().st_mtime_ns == made


def test_questions_of_a_val_jsonl_are_taken_as_they_are(config_file: ConfigWriter, tmp_path: Path) -> None:
    config = load_config(config_file())
    data = tmp_path / "data"
    data.mkdir()
    for folder in filter(Path.is_dir, Path(config.data.root).iterdir()):
        (data / folder.name).mkdir()
        for entry in folder.iterdir():
            (data / folder.name / entry.name).symlink_to(entry)
    lines = (data / "PCam" / "test.jsonl").read_text().splitlines()[:2]
    (data / "PCam" / "val.jsonl").write_text("\n".join(lines) + "\n")
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": str(data)})})
    make_validation_root(config, tmp_path / "root", 0.25)
    assert (tmp_path / "root" / "PCam" / "test.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "root" / "PCam" / "train.json").resolve() == (data / "PCam" / "train.json").resolve()


def test_workers_draw_different_values_and_a_killed_trial_comes_back(config_file: ConfigWriter, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("{regularization.beta: {low: 0.001, high: 0.1, log: true}}")
    plan = Plan(config_file(), (), read_space(space), trials=3)
    part = StudyPart("first", (), 1, ("regularization.beta",), ())
    plan.folder.mkdir(parents=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(plan.folder / JOURNAL)))
    optuna.create_study(storage=storage, study_name=part.name, direction="maximize")
    (study, first), (_, second) = (
        ask(plan, part, 0),
        ask(plan, part, 1),
    )  # both workers have begun, neither has finished
    assert first.params != second.params
    study.tell(first, 50.0)
    requeue_killed(study)  # as the next launch does
    assert ask(plan, part, 1)[1].params == second.params
    assert ask(plan, part, 2)[1].params not in (first.params, second.params)


def test_joint_training_is_not_tuned_causally(config_file: ConfigWriter) -> None:
    plan = Plan(config_file(), ("method=joint",), read_space("joint"), trials=1)
    with pytest.raises(ConfigError, match="tune it with --seeds"):
        tune(plan, [None])


@pytest.mark.slow
def test_a_tuning(config_file: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two studies: the stream's values on the first task, the second task's own; again, nothing is left to do."""
    config = config_file()
    space = tmp_path / "space.yaml"
    space.write_text("{regularization.beta: [0.01, 0.02], tasks.*.learning_rate: [0.001, 0.002]}")
    words = ["tune", str(config), "tasks=[pathvqa,PCAM]", "--space", str(space), "--trials", "2", "--first", "1"]
    words += ["--jobs", "1", "--validation", "0.25"]
    assert main(words) == 0
    folder = load_config(config).run_dir / "tune"
    found = studies(folder)
    assert {name: [trial.state.name for trial in trials] for name, trials in found.items()} == {
        "first": ["COMPLETE", "COMPLETE"],
        "2-PCAM": ["COMPLETE", "COMPLETE"],
    }
    chosen = yaml.safe_load((folder / "best.yaml").read_text())
    first, second = (best_trial(found[name]) for name in ("first", "2-PCAM"))
    assert first is not None and second is not None
    assert chosen["regularization"]["beta"] == first.params["regularization.beta"]
    rates = {task["name"]: task["learning_rate"] for task in chosen["tasks"]}
    assert rates == {"pathvqa": first.params["tasks.*.learning_rate"], "PCAM": second.params["tasks.*.learning_rate"]}
    load_config(folder / "best.yaml")
    assert "Best configuration" in (folder / "tune.html").read_text()
    for ledger in folder.rglob("ledger.json"):
        assert str(folder / "data") in (ledger.parent / "config.yaml").read_text()
        assert json.loads(ledger.read_text())["tasks"]
    assert main(words) == 0
    assert {name: len(trials) for name, trials in studies(folder).items()} == {"first": 2, "2-PCAM": 2}
