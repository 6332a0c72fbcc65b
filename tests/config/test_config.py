import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from mslora_cr.config.load import load_config, training_fields
from mslora_cr.config.methods import load_method
from mslora_cr.config.schema import ConfigError, StreamConfig

MINIMAL: dict[str, Any] = {
    "run": "small",
    "model": {"path": "model"},
    "data": {"root": "data"},
    "tasks": [
        {"name": "pathvqa", "epochs": 3, "batch_size": 24, "learning_rate": 2e-4},
        {"name": "slake-vqarad", "epochs": 4, "batch_size": 24, "learning_rate": 2e-4},
        {"name": "PCAM", "epochs": 1, "batch_size": 24, "learning_rate": 2e-4},
    ],
}


def write(folder: Path, name: str = "run.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}), encoding="utf-8")
    return path


def write_text(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# --- what is derived -----------------------------------------------------------------------------------------------


def test_published_data_sets_are_known_and_relations_derived(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, output_dir="out", results_dir="res"))
    pathvqa, slake, pcam = config.stream
    assert (pathvqa.modality, slake.modality, pcam.modality) == ("pathology", "radiology", "pathology")
    assert (pcam.folder, pcam.image_folders, pcam.index) == ("PCam", ["train", "test"], 2)
    assert [config.same_modality(task) for task in config.stream] == [[], [False], [True, False]]
    assert (config.run_dir, config.results_run_dir) == (Path("out/small"), Path("res/small"))
    assert config.datasets["PCAM"].published == "PCAM"


def test_a_new_data_set_beside_the_published_ones(tmp_path: Path) -> None:
    mine = {"modality": "endoscopy", "folder": "Mine"}
    task = {"name": "mine", "epochs": 1, "batch_size": 8, "learning_rate": 1e-4}
    config = load_config(write(tmp_path, datasets={"mine": mine}, tasks=[*MINIMAL["tasks"], task]))
    assert config.same_modality(config.task("mine")) == [False, False, False]
    assert config.task("mine").folder == "Mine"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 2e-4 as a string."""
    text = yaml.safe_dump(MINIMAL).replace("learning_rate: 0.0002", "learning_rate: 2e-4")
    assert "2e-4" in text
    config = load_config(write_text(tmp_path, text), ["regularization.beta=1e-2", "lora.dropout=1e-1"])
    assert config.stream[0].learning_rate == 2e-4
    assert (config.regularization.beta, config.lora.dropout) == (0.01, 0.1)


def test_the_home_folder_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    places = ["output_dir=~/runs", "results_dir=~/results", "model.path=~/model", "model.vision_tower=~/clip"]
    config = load_config(write(tmp_path), [*places, "data.root=~/data", "data.cache_image_features=~/features"])
    assert config.run_dir == Path("/home/me/runs/small") and config.results_dir == "/home/me/results"
    assert (config.model.path, config.model.vision_tower) == ("/home/me/model", "/home/me/clip")
    assert (config.data.root, config.data.cache_image_features) == ("/home/me/data", "/home/me/features")


def test_the_resolved_configuration_reads_as_itself(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["lora.rank=8", "training.save_steps=5"])
    resolved = write_text(tmp_path, yaml.safe_dump(config.model_dump(mode="json")), "resolved.yaml")
    assert load_config(resolved) == config


def test_the_digest_follows_what_decides_the_banks(tmp_path: Path) -> None:
    path = write(tmp_path)
    digest = load_config(path).training_digest()
    for harmless in (
        "output_dir=elsewhere",
        "results_dir=elsewhere",
        "model.device=cpu",
        "data.check_images=false",
        "evaluation.batch_size=1",
        "training.save_steps=7",
        "training.report_to=wandb",
        "training.eval_strategy=epoch",  # measuring moves nothing
        "training.keep=last",
        "data.validation_questions=5",
    ):
        assert load_config(path, [harmless]).training_digest() == digest, harmless
    for decisive in (
        "seed=1",
        "method=each",
        "lora.rank=8",
        "lora.fold=concatenate",
        "model.dtype=float32",
        "data.max_length=100",
        "data.images=all",
        "regularization.alpha=0.2",
        "tasks.PCAM.epochs=2",
        "tasks=[pathvqa, PCAM]",
        "training.warmup_steps=3",
        "data.validation=0.1",
        "training.keep=best",
        "training.patience=3",
    ):
        assert load_config(path, [decisive]).training_digest() != digest, decisive


# --- overrides and layers --------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, lora={"rank": 64, "alpha": 64})
    config = load_config(
        path,
        ["lora.rank=8", "tasks.*.batch_size=4", "tasks.PCAM.epochs=0.5", "training.bf16=true", "model.dtype=float32"],
    )
    assert (config.lora.rank, config.lora.alpha) == (8, 64)
    assert [task.batch_size for task in config.tasks] == [4, 4, 4]
    assert [task.epochs for task in config.tasks] == [3, 4, 0.5]
    assert config.training == {"bf16": True}


def test_a_selection_and_order_of_tasks(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["tasks=[PCAM, pathvqa]", "tasks.PCAM.epochs=9"])
    assert [(task.name, task.epochs) for task in config.tasks] == [("PCAM", 9), ("pathvqa", 3)]
    assert "did you mean 'PCAM'?" in error_of(write(tmp_path), "tasks=[PACM]")


def test_a_file_over_another(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", lora={"rank": 16, "alpha": 32}, training={"bf16": True, "tf32": True})
    middle = {"extends": "base/run.yaml", "training": {"tf32": False}, "lora": {"rank": 4}}
    write_text(tmp_path, yaml.safe_dump(middle), "middle.yaml")
    top = {"extends": "middle.yaml", "run": "top", "tasks": MINIMAL["tasks"][:1]}
    config = load_config(write_text(tmp_path, yaml.safe_dump(top), "top.yaml"))
    assert config.run == "top"
    assert (config.lora.rank, config.lora.alpha) == (4, 32)
    assert config.training == {"bf16": True, "tf32": False}
    assert [task.name for task in config.tasks] == ["pathvqa"]  # lists are replaced, not merged


@pytest.mark.parametrize("names", [["run.yaml"], ["other.yaml", "run.yaml"]])
def test_extends_in_a_circle_is_refused(names: list[str], tmp_path: Path) -> None:
    for name, parent in zip(["run.yaml", *names], names, strict=False):
        write(tmp_path, name, extends=parent)
    assert "leads back to this file" in error_of(tmp_path / "run.yaml")


def test_extends_of_a_file_that_is_not_there_names_it(tmp_path: Path) -> None:
    assert "none.yaml: cannot be read" in error_of(write(tmp_path, extends="none.yaml"))
    assert "`extends` must name one file" in error_of(write(tmp_path, extends=["a", "b"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=8", "lora.rnk: unknown key; did you mean 'rank'?"),
        ("lora", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("lora.rank=!!python/object:os.system x", "not plain YAML"),
        ("lora.rank=[1", "not plain YAML"),
        ("tasks.PACM.epochs=1", "unknown task 'PACM'; did you mean 'PCAM'?"),
        ("tasks.PCAM.epoch=1", "tasks.PCAM.epoch: unknown key; did you mean 'epochs'?"),
        ("tasks.PCAM=3", "name a key of the task too, as in tasks.PCAM.epochs=1"),
        ("tasks.*=3", "name a key of the task too"),
        ("tasks.PCAM.epochs.more=1", "has a value, not further keys"),
        ("run.name=x", "'run' has a value, not further keys"),
        ("modle.path=x", "modle: unknown key; did you mean 'model'?"),
        ("datasets.PCAM.modalty=x", "did you mean 'modality'?"),
        ("extends=other.yaml", "extends"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str, tmp_path: Path) -> None:
    assert message in error_of(write(tmp_path), override)


@pytest.mark.parametrize("tasks", [None, "pathvqa", ["pathvqa"], [None], [{"name": ["a"]}]])
@pytest.mark.parametrize("override", ["tasks.PCAM.epochs=1", "tasks.*.epochs=1", "tasks=[PCAM]"])
def test_overrides_of_tasks_that_are_no_tasks_are_refused(tasks: Any, override: str, tmp_path: Path) -> None:
    assert "task" in error_of(write(tmp_path, tasks=tasks), override)


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metod": "each"}, "metod: unknown key; did you mean 'method'?"),
        ({"lora": {"rank": 8, "dropuot": 0.1}}, "lora.dropuot: unknown key; did you mean 'dropout'?"),
        ({"lora": {"rank": 0}}, "lora.rank: should be greater than or equal to 1, found 0"),
        ({"lora": {"rank": "eight"}}, "lora.rank: should be a whole number, found 'eight'"),
        ({"lora": {"rank": True}}, "lora.rank: should be a whole number, found True"),
        ({"lora": {"rank": 8.5}}, "lora.rank: should be a whole number, found 8.5"),
        ({"lora": {"rank": "x" * 1000}}, "xxx...xxx"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: should be less than 1, found 1.0"),
        ({"lora": None}, "lora: should be a section of keys, found None"),
        ({"lora": 3}, "lora: should be a section of keys, found 3"),
        ({"method": "rehearsal"}, "method"),
        ({"run": "../elsewhere"}, "run: should be letters, digits and any of . _ + -, the first a letter or digit"),
        ({"run": ""}, "run"),
        ({"run": None}, "run: should be text, found None"),
        ({"run": 2024}, "run: should be text, found 2024; quote it, on the command line as '\"2024\"'"),
        ({"seed": -1}, "seed: should be greater than or equal to 0, found -1"),
        ({"seed": 2**31}, "seed: should be less than"),
        ({"model": {}}, "model.path: required, but not given"),
        ({"model": {"path": "m", "dtype": "int8"}}, "model.dtype"),
        ({"regularization": {"alpha": -0.5}}, "alpha is -0.5; give a weight of at least 0, or -1"),
        ({"regularization": {"beta": float("nan")}}, "regularization.beta"),
        ({"model": {"path": "m", "device": "gpu"}}, "model.device: should be 'auto', 'cpu' or 'cuda', found 'gpu'"),
        ({"tasks": []}, "tasks: should have at least one entry"),
        ({"tasks": [3]}, "tasks.0: should be a section of keys, found 3"),
        ({"tasks": [{"name": ["a"]}]}, "tasks.0.name: should be text, found ['a']"),
        ({"tasks": MINIMAL["tasks"] + MINIMAL["tasks"][:1]}, "task 'pathvqa' appears twice"),
        ({"tasks": [{**MINIMAL["tasks"][0], "name": "patvqa"}]}, "unknown task 'patvqa'; did you mean 'pathvqa'?"),
        ({"tasks": [{**MINIMAL["tasks"][0], "epochs": 0}]}, "tasks.pathvqa.epochs: should be greater than 0, found 0"),
        (
            {"tasks": [{**MINIMAL["tasks"][0], "learning_rate": float("inf")}]},
            "tasks.pathvqa.learning_rate: should be a finite number, found inf",
        ),
        ({"tasks": [{**MINIMAL["tasks"][0], "lerning_rate": 1}]}, "did you mean 'learning_rate'?"),
        ({"tasks": [{"name": "pathvqa"}]}, "tasks.pathvqa.epochs: required, but not given"),
        ({"datasets": {"mine": {"folder": "Mine"}}}, "datasets.mine.modality: required, but not given"),
        ({"datasets": {"PCAM": {"modaliti": "x"}}}, "datasets.PCAM.modaliti: unknown key; did you mean 'modality'?"),
        ({"datasets": {"a/b": {"modality": "x", "folder": "x"}}}, "datasets.a/b: should be letters, digits and"),
        ({5: "five"}, "5"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[Any, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}), encoding="utf-8")
    assert message in error_of(path)


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, metod="each", lora={"rnk": 3}))
    assert "metod" in message and "lora.rnk" in message


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch PROOF']", "a: &x [*x", "- a list", "just words", "", "\x00", "a: b: c"],
)
def test_a_file_that_is_no_plain_mapping_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "run.yaml") in error_of(write_text(tmp_path, text))
    assert not (tmp_path / "PROOF").exists()


def test_an_empty_file_is_called_so(tmp_path: Path) -> None:
    assert "run.yaml: the file is empty" in error_of(write_text(tmp_path, "# nothing yet\n"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run: \xff\xfe")
    assert "not plain YAML" in error_of(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML keeps the last of two; the first would be without effect, silently."""
    text = yaml.safe_dump(MINIMAL) + "lora: {rank: 8}\nlora: {alpha: 8}\n"
    assert "'lora' appears twice" in error_of(write_text(tmp_path, text))


# --- the training section --------------------------------------------------------------------------------------------


def fields(tmp_path: Path, **training: Any) -> dict[str, Any]:
    return training_fields(StreamConfig.model_validate({**MINIMAL, "training": training, "datasets": DATASETS}))


DATASETS = {
    task["name"]: {"modality": "any", "folder": "any", "image_folders": [], "published": None}
    for task in MINIMAL["tasks"]
}


def test_training_takes_any_field_of_transformers(tmp_path: Path) -> None:
    given = {"warmup_steps": "3e-2", "lr_scheduler_type": "cosine", "bf16": True, "save_steps": 10}
    assert fields(tmp_path, **given) == {**given, "warmup_steps": 0.03}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"warmup_stps": 1}, "training.warmup_stps: unknown key; did you mean 'warmup_steps'?"),
        ({"learning_rate": 1e-3}, "use tasks.NAME.learning_rate"),
        ({"output_dir": "x"}, "use output_dir"),
        ({"gradient_accumulation_steps": 2}, "training.per_device_train_batch_size"),
        ({"seed": 1}, "use seed"),
        ({"per_device_eval_batch_size": 2}, "use evaluation.batch_size"),
        ({"load_best_model_at_end": True}, "use training.keep instead"),
        ({"keep": "first"}, "training.keep: should be 'last' or 'best', found 'first'"),
        ({"patience": 0}, "training.patience: should be greater than or equal to 1, found 0"),
        ({"keep": "best", "eval_strategy": "no"}, "training.keep needs validation; set training.eval_strategy"),
        ({"patience": 2, "eval_strategy": "no"}, "training.patience needs validation"),
        ({"eval_strategy": "steps"}, "training.eval_strategy: steps needs training.eval_steps"),
        ({"eval_strategy": "often"}, "training.eval_strategy is 'often'; choose one of steps, epoch, no"),
        ({"label_smoothing_factor": 0.1}, "the loss is the mean cross-entropy"),
        ({"save_on_each_node": True}, "all nodes write to one shared folder"),
        ({"logging_nan_inf_filter": True}, "a loss that is not finite stops training"),
        ({"length_column_name": "size"}, "lengths are counted from the records"),
        ({"save_total_limit": 0}, "training.save_total_limit is 0: give the number"),
        ({"save_total_limit": -1}, "training.save_total_limit is -1: give the number"),
        ({"save_total_limit": None}, "training.save_total_limit is None: give the number"),
        ({"save_steps": "often"}, "training.save_steps: should be a number, found 'often'"),
        ({"bf16": "maybe"}, "training.bf16: should be true or false, found 'maybe'"),
    ],
)
def test_a_wrong_training_field_is_refused(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fields(tmp_path, **training)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "key",
    sorted(
        {"eval_delay", "eval_on_start", "eval_accumulation_steps", "do_predict"}
        | {"prediction_loss_only", "batch_eval_metrics", "include_for_metrics", "eval_do_concat_batches"}
        | {"eval_use_gather_object", "bf16_full_eval", "fp16_full_eval"}
    ),
)
def test_the_trainers_own_evaluation_is_refused(key: str, tmp_path: Path) -> None:
    """There is none, so that its settings would be without effect; also where they hold their default."""
    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == key)
    with pytest.raises(ConfigError, match=f"training.{key} cannot be set: `mslora-cr evaluate`"):
        fields(tmp_path, **{key: default})


def test_validation_is_on_where_something_asks_for_it(tmp_path: Path) -> None:
    assert "eval_strategy" not in fields(tmp_path)
    assert fields(tmp_path, eval_strategy=False) == {"eval_strategy": "no"}  # YAML's bare no
    assert fields(tmp_path, keep="best") == {
        "keep": "best",
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
    }


def test_how_many_checkpoints_are_kept_is_given(tmp_path: Path) -> None:
    assert [fields(tmp_path, save_total_limit=limit)["save_total_limit"] for limit in (1, 3)] == [1, 3]


# --- methods -------------------------------------------------------------------------------------------------------


def test_a_method_brings_its_section_and_what_its_source_answers_with(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, method="olora"), ["olora.lambda_2=1e-1"])
    assert config.model_dump()["olora"] == {"lambda_2": 0.1, "relative": 3.0}
    assert config.evaluation.banks_by == "all"
    assert (
        load_config(write(tmp_path, method="olora", evaluation={"banks_by": "prefix"})).evaluation.banks_by == "prefix"
    )
    plain = load_config(write(tmp_path))
    assert "olora" not in plain.model_dump() and plain.evaluation.banks_by == "prefix"


def test_sections_of_other_methods_and_unknown_hyper_parameters_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, olora={"lambda_1": 0.5})
    assert "olora: belongs to method 'olora', but this run's method is 'mslora_cr'" in error_of(path)
    assert "olora.lambda1: unknown key; did you mean 'lambda_1'?" in error_of(path, "method=olora", "olora.lambda1=1")
    assert "olora.lambda_1" in error_of(path, "method=olora", "olora.lambda_1=-1")
    assert "method: unknown method 'oloro'; did you mean 'olora'?; there are each, ewc, " in error_of(
        path, "method=oloro"
    )
    assert "method: " in error_of(path, "method=[olora]")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "nowhere:Mine",
            "nowhere:Mine: there is no module 'nowhere' in the working directory, {here}, or on PYTHONPATH",
        ),
        ("mine:Mime", "mine.py has no Mime; did you mean 'Mine'?"),
        ("mine:Path", "mine:Path: Path is no subclass of mslora_cr.methods.base.Method"),
        ("mine:Nameless", "Nameless needs a `name` of lower-case letters"),
        ("mine:Model", "method mine:Model: its name, 'model', is a key of every configuration"),
        ("broken:Mine", "broken:Mine: importing broken failed: ZeroDivisionError"),
        ("lacking:Mine", "lacking:Mine: importing lacking failed: No module named 'not_installed'"),
        ("mine:Mine", "mine: batches of 24 are none of mine"),
    ],
)
def test_a_method_outside_the_package_that_is_none_is_refused(
    method: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "from pathlib import Path\nfrom mslora_cr.methods.base import Method\nclass Nameless(Method): pass\n"
    classes = (
        "class Model(Method): name = 'model'\nclass Mine(Method):\n    name = 'mine'\n    def check(self, config):\n"
    )
    check = "        raise ValueError(f'mine: batches of {config.tasks[0].batch_size} are none of mine')\n"
    write_text(tmp_path, base + classes + check, "mine.py")
    write_text(tmp_path, "1 / 0", "broken.py")
    write_text(tmp_path, "import not_installed", "lacking.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    load_method.cache_clear()
    assert message.format(here=tmp_path) in error_of(write(tmp_path, method=method))


LATER_DEFAULTS = ("auto", "frobenius", True, None, 200)
"""Of keys that the configuration did not have then, and that decide nothing at these values."""


def test_every_methods_configuration_is_what_it_was(tmp_path: Path) -> None:
    """`tests/fixtures/method_digests.json` is of the version in which sections were fields of the configuration: what a
    run folder records must still be found the same, by method, with and without its section."""
    recorded = json.loads((Path(__file__).parents[1] / "fixtures" / "method_digests.json").read_text(encoding="utf-8"))
    sections: dict[str, dict[str, Any]] = {
        "olora": {"lambda_1": 0.25, "lambda_2": 0.1},
        "ewc": {"mode": "per_task", "strength": 1e4, "decay": 0.5, "fisher_batches": 2},
        "lwf": {"strength": 2.0, "temperature": 3.0},
        "replay": {"buffer_size": 10, "share": 0.25},
        "moe_lora": {"experts": 2},
    }
    names = ("pathvqa", "PCAM", "derm")
    tasks = [{"name": name, "epochs": 2, "batch_size": 8, "learning_rate": 2e-4} for name in names]
    settings = {"run": "recorded", "model": {"path": "m"}, "data": {"root": "d"}, "training": {"bf16": True}}
    former = {"olora": {"lambda_1": 0.5}}  # its default then
    for key, expected in recorded.items():
        method, _, given = key.partition(" ")
        section = (
            {method: sections[method]} if given == "with" else {method: former[method]} if method in former else {}
        )
        path = write_text(tmp_path, yaml.safe_dump({**settings, "method": method, "tasks": tasks, **section}))
        config = load_config(path)
        dumped = config.model_dump(mode="json")
        later = (("model", "kernels"), ("regularization", "distance"), ("evaluation", "probabilities"))
        later += (("data", "validation"), ("data", "validation_questions"))
        assert tuple(dumped[section].pop(name) for section, name in later) == LATER_DEFAULTS
        written = yaml.safe_dump(dumped, sort_keys=False).encode()
        assert expected == {
            "all": config.training_digest(),
            "second": config.training_digest(config.stream[1]),
            "config.yaml": hashlib.sha256(written).hexdigest(),
        }, key
    assert len(recorded) == 11 + len(sections)


# --- the shipped runs ------------------------------------------------------------------------------------------------

# Task → (epochs, global batch, learning rate), as published.
PUBLISHED = {
    "finetune_lora_each": (
        "finetune_lora_each-64-64_llava_med_v1.5",
        {
            **dict.fromkeys(("pathvqa", "slake-vqarad", "derm"), (3, 16, 0.0002)),
            **dict.fromkeys(("PCAM", "CXP", "HAM"), (1, 16, 0.0002)),
            **dict.fromkeys(("nmi", "iu-x-ray"), (6, 16, 0.0002)),
        },
    ),
    "finetune_mslora_cr_ortho": (
        "finetune_lora_MSLoRA-CR-ORTHO-64-64_llava_med_v1.5",
        {
            "pathvqa": (3, 24, 2e-4),
            "slake-vqarad": (4, 24, 2e-4),
            "derm": (4, 24, 2e-4),
            "PCAM": (1, 24, 2e-4),
            "CXP": (1, 24, 2e-4),
            "HAM": (1, 16, 2e-5),
            "nmi": (6, 16, 2e-4),
            "iu-x-ray": (9, 16, 2e-4),
        },
    ),
    "finetune_mslora_cr_ortho_6task": (
        "finetune_lora_MSLoRA-CR-ORTHO_6TASK-64-64_llava_med_v1.5",
        {
            "pathvqa": (3, 32, 2e-4),
            "slake-vqarad": (4, 32, 2e-4),
            "PCAM": (1, 32, 2e-4),
            "CXP": (1, 32, 2e-4),
            "nmi": (6, 32, 2e-4),
            "iu-x-ray": (9, 16, 2e-4),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shipped_runs_hold_the_published_protocol(name: str) -> None:
    run, tasks = PUBLISHED[name]
    file = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    config = load_config(file)
    found = {task.name: (task.epochs, task.batch_size, task.learning_rate) for task in config.tasks}
    assert list(found.items()) == list(tasks.items())
    assert config.run == run
    assert config.method == ("each" if name.endswith("each") else "mslora_cr")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 64, 0)
    assert (config.regularization.alpha, config.regularization.beta) == (0.1, 0.01)
    assert (config.seed, config.data.max_length, config.evaluation.max_new_tokens) == (42, 2048, 100)
    assert (config.model.dtype, config.model.vision_tower) == ("bfloat16", "config")
    expected = {
        "weight_decay": 0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 0,
        "bf16": True,
        "tf32": True,
        "gradient_checkpointing": "auto",  # true as published: it moves no number, and is not in the digest
    }
    assert {key: config.training[key] for key in expected} == expected
    as_published = load_config(file, ["training.gradient_checkpointing=true"])
    assert as_published.training_digest() == config.training_digest()
    relations = {task.name: config.same_modality(task) for task in config.stream}
    assert relations["PCAM"][0] is True and relations["CXP"][:2] == [False, True]
