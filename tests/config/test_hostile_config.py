"""Configurations that are wrong by themselves, that hold secrets, or that cost more to read than to refuse."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mslora_cr.cli.main import main
from mslora_cr.config.load import MOST_LAYERS, load_config, read_layers, training_fields
from mslora_cr.config.plain_yaml import MOST_BYTES
from mslora_cr.config.schema import ConfigError
from mslora_cr.training.arguments import training_arguments
from tests.conftest import ConfigWriter


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_type is 'cosine_with_min_lr', without lr_scheduler",
        ),
        ("lr_scheduler_type=warmup_stable_decay", "training.lr_scheduler_type is 'warmup_stable_decay', without"),
        ("lr_scheduler_type=reduce_lr_on_plateau", "training"),
        ("optim=galore_adamw", "training.optim is 'galore_adamw': You need to install `galore_torch`"),
        (
            "dataloader_persistent_workers=true",
            "training.dataloader_…: persistent_workers option needs num_workers > 0",
        ),
        ("eval_on_start=true", "training.eval_on_start cannot be set"),
        ("hub_model_id=some/where", "training.hub_model_id cannot be set"),
    ],
)
def test_a_setting_that_is_wrong_by_itself_is_found_before_anything_is_read(
    setting: str, message: str, config_file: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(
        model={"path": str(tmp_path / "not-read"), "device": "cpu"}, data={"root": str(tmp_path / "root")}
    )
    (tmp_path / "root" / "PathVQA").mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    record = {"id": 0, "image": "not-read.png", "conversations": turns}
    (tmp_path / "root" / "PathVQA" / "train.json").write_text(json.dumps([record]))
    assert main(["train", str(path), "--task", "pathvqa", f"training.{setting}"]) == 1
    assert message in capsys.readouterr().err


def test_the_right_form_of_a_scheduler_is_taken(config_file: ConfigWriter) -> None:
    config = load_config(
        config_file(), ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs={min_lr: 1e-6}"]
    )
    args = training_arguments(config, config.stream[0], training_fields(config))
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_a_bare_no_is_the_word_where_there_is_such_a_word(config_file: ConfigWriter) -> None:
    config = load_config(config_file(), ["training.save_strategy=no"])
    assert config.training["save_strategy"] is False and training_fields(config)["save_strategy"] == "no"


@pytest.mark.parametrize(("word", "quoted"), [("no", "no"), ("off", "no"), ("yes", "yes")])
def test_a_bare_no_elsewhere_is_explained(word: str, quoted: str, config_file: ConfigWriter) -> None:
    with pytest.raises(
        ConfigError, match=f"YAML reads a bare {quoted}, .*quote it, on the command line as '\"{quoted}\"'"
    ):
        load_config(config_file(), [f"run={word}"])


@pytest.mark.parametrize(
    "override",
    [
        "training.hub_token=x",
        "training.project=hf_NotARealTokenXYZ",
        "training.lr_scheduler_kwargs={deep: {api_key: x}}",
        "model.path=https://me:pass@host/model",
    ],
)
def test_a_secret_is_refused_and_not_repeated(override: str, config_file: ConfigWriter) -> None:
    with pytest.raises(ConfigError, match=r"looks like a secret, .*HF_TOKEN") as caught:
        load_config(config_file(), [override])
    assert "NotAReal" not in str(caught.value) and "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("".join(f"k{number}: 1\n" for number in range(60_000)), "may have at most 262,144"),
        (" " * 30_000_000, "may have at most 262,144"),
        ("".join(f"k{number}: 1\n" for number in range(20_000)), "unknown key"),
        ("a: &a {b: *a}", "an anchor that contains itself"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
            "more than 50,000 values, aliases expanded",
        ),
        ("a: " + "[" * 200 + "]" * 200, "nested too deeply"),
        ("seed: !!int ''", "a value that does not match its tag"),
        ("seed: !!timestamp foo", "a value that does not match its tag"),
        ('data: {root: "a\\0b"}', "data.root: contains a NUL character"),
        ("\xff", "not UTF-8"),
    ],
)
def test_yaml_that_costs_more_to_read_than_to_refuse(
    text: str, message: str, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    path = tmp_path / "hostile.yaml"
    settings = yaml.safe_dump({key: value for key, value in tiny_settings.items() if key not in ("seed", "data")})
    path.write_bytes((text + "\n" + settings * (len(text) < 1 << 18)).encode("latin-1"))
    start = time.process_time()
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    assert time.process_time() - start < 10


def test_a_fifo_and_a_byte_order_mark(tmp_path: Path, config_file: ConfigWriter) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(ConfigError, match=r"fifo\.yaml: cannot be read \(not a regular file\)"):
        load_config(tmp_path / "fifo.yaml")
    path = config_file()
    before = load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path) == before


def test_a_chain_of_files_that_extend_each_other_has_an_end(tmp_path: Path) -> None:
    for number in range(MOST_LAYERS):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / f"{MOST_LAYERS}.yaml").write_text("run: last\n")
    with pytest.raises(ConfigError, match=f"extends more than {MOST_LAYERS} files"):
        read_layers(tmp_path / "0.yaml")
    assert read_layers(tmp_path / "1.yaml") == {"run": "last"}
    (tmp_path / "1.yaml").write_text("#" * (MOST_BYTES - 100) + "\nextends: 2.yaml\n")  # one alone is not too large
    with pytest.raises(ConfigError, match=r"1\.yaml and what it extends have more than 262,144 bytes"):
        read_layers(tmp_path / "1.yaml")
