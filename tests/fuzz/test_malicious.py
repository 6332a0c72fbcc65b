"""Hostile input through the command line: refused with a message, and nothing is run or written."""

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.cli.main import main
from mslora_cr.models.llava_med import load
from tests.conftest import GOLDEN, ConfigWriter
from tests.data.sources.test_prepare import everything
from tests.data.test_images import bomb

HUGE = {"infinite": "1e999999", "of 100,000 digits": "1" * 100_000}


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that must fail and leave every file as it was; gives what it said."""

    def run(*command: str) -> str:
        monkeypatch.chdir(tmp_path)
        before = everything(tmp_path)
        folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
        capsys.readouterr()
        assert main(command) == 1
        assert everything(tmp_path) == before
        assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders
        return capsys.readouterr().err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The golden base model, to be spoiled; its tower stands beside it."""
    for name in ("llava_med_tiny", "clip-tiny-patch14"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path / "llava_med_tiny"


@pytest.fixture
def banks(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "checkpoints" / "pathvqa", tmp_path / "published" / "pathvqa")
    return tmp_path / "published"


@pytest.fixture
def data(tmp_path: Path, tiny_data: Path) -> Path:
    shutil.copytree(tiny_data / "PathVQA", tmp_path / "data" / "PathVQA")
    return tmp_path / "data"


def spoil(path: Path, key: str, text: str) -> None:
    """Replace a value somewhere in a JSON file by text that need not be JSON."""

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: "@@@" if name == key else replaced(value) for name, value in node.items()}
        return [replaced(item) for item in node] if isinstance(node, list) else node

    content = json.dumps(replaced(json.loads(path.read_text())))
    assert '"@@@"' in content
    path.write_text(content.replace('"@@@"', text))


# --- pickles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_published_bank_that_is_not_plain_tensors(
    writer: str, banks: Path, tmp_path: Path, config_file: ConfigWriter, refused: Refused
) -> None:
    file, trap = banks / "pathvqa" / "cl_lora.bin", {"model.layers.0": Trap(tmp_path / "proof")}
    if writer == "torch":
        torch.save(trap, file)
    else:
        file.write_bytes(pickle.dumps(trap))
    config = str(config_file(lora={"rank": 4, "alpha": 8}))
    assert "not plain tensors, so it is not opened" in refused("evaluate", config, "--banks", str(banks))
    assert "not plain tensors, so it is not opened" in refused("bank", "show", str(file))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_tower_that_is_not_plain_tensors(
    writer: str, model: Path, tmp_path: Path, config_file: ConfigWriter, refused: Refused
) -> None:
    set_trap(tmp_path / "clip-tiny-patch14", tmp_path / "proof", writer)
    command = ("evaluate", str(config_file()), "--banks", str(GOLDEN / "checkpoints"), f"model.path={model}")
    message = refused_but_for_results(refused, tmp_path, command)
    assert "clip-tiny-patch14: the weights of the vision tower that" in message
    assert "are not plain tensors, so they are not opened" in message and "weights_only" not in message


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_model_in_transformers_layout_that_is_not_plain_tensors(
    writer: str, model: Path, tmp_path: Path, config_file: ConfigWriter, refused: Refused
) -> None:
    base, folder = load(model), tmp_path / "transformers"
    base.model.save_pretrained(folder)
    base.image_processor.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(model / name, folder)
    set_trap(folder, tmp_path / "proof", writer)
    command = ("evaluate", str(config_file()), "--banks", str(GOLDEN / "checkpoints"), f"model.path={folder}")
    message = refused_but_for_results(refused, tmp_path, command)
    assert f"{folder}: the weights of the model are not plain tensors, so they are not opened" in message
    assert "weights_only" not in message


def set_trap(folder: Path, proof: Path, writer: str) -> None:
    """Put a pickle in the place of a folder's weights that makes a folder of its own where it is unpickled."""
    (folder / "model.safetensors").unlink()
    file, trap = folder / "pytorch_model.bin", {"vision_model.post_layernorm.weight": Trap(proof)}
    if writer == "torch":
        torch.save(trap, file)
    else:
        file.write_bytes(pickle.dumps(trap))


def refused_but_for_results(refused: Refused, tmp_path: Path, command: tuple[str, ...]) -> str:
    """An evaluation makes its results folder before it loads the model."""
    (tmp_path / "results" / "tiny" / "pathvqa").mkdir(parents=True)
    return refused(*command)


def test_annotations_that_are_not_plain_data(tmp_path: Path, refused: Refused) -> None:
    raw = tmp_path / "raw" / "qas" / "train"
    raw.mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (raw / "train_qa.pkl").write_bytes(pickle.dumps([Trap(tmp_path / "proof")]))
    (tmp_path / "root" / "PathVQA").mkdir()
    message = refused("data", "prepare", "pathvqa", "--raw", str(tmp_path / "raw"), "--root", "root", "--annotations")
    assert "refused: this pickle wants to load posix.mkdir" in message


# --- code and tags -------------------------------------------------------------------------------------------------


def test_a_tower_that_brings_its_own_code(
    model: Path, tmp_path: Path, config_file: ConfigWriter, refused: Refused
) -> None:
    tower = tmp_path / "clip-tiny-patch14"
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    (tower / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'proof')!r})\nclass Own: ...\n")
    command = ("evaluate", str(config_file()), "--banks", str(GOLDEN / "checkpoints"), f"model.path={model}")
    assert "no image processor configuration" in refused_but_for_results(refused, tmp_path, command)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [proof]", "!!python/name:os.system", "!own {a: 1}"])
def test_a_yaml_tag(tag: str, tmp_path: Path, config_file: ConfigWriter, refused: Refused) -> None:
    path = config_file()
    assert "could not determine a constructor for the tag" in refused("train", str(path), f"run={tag}")
    path.write_text(f"run: {tag}\n")
    assert "not plain YAML: could not determine a constructor" in refused("train", str(path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        (":".join(["59"] * 20_000), "a number of more than 64 bits"),
        ("1" * 100_000, "digits"),
        ("1e999999", "seed: should be a whole number, found '1e999999'"),
    ],
)
def test_a_yaml_value_without_bounds(value: str, message: str, config_file: ConfigWriter, refused: Refused) -> None:
    path = config_file()
    path.write_text(path.read_text() + f"seed: {value}\n")
    assert message in refused("train", str(path))


def test_a_training_field_without_bounds(config_file: ConfigWriter, refused: Refused) -> None:
    message = refused("train", str(config_file()), "training.weight_decay=1e999999")
    assert "training.weight_decay: should be a finite number" in message


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", ["id", "extra"])
def test_a_huge_number_in_annotations(
    key: str, number: str, data: Path, config_file: ConfigWriter, refused: Refused
) -> None:
    folder = data / "PathVQA"
    records = [{**record, "extra": 0} for record in json.loads((folder / "train.json").read_text())]
    (folder / "train.json").write_text(json.dumps(records[:1]))
    spoil(folder / "train.json", key, number)
    message = refused("train", str(config_file()), f"data.root={data}", "--task", "pathvqa")
    assert f"{folder / 'train.json'}: record 0: not acceptable JSON" in message


@pytest.mark.parametrize("number", HUGE.values(), ids=HUGE)
def test_a_huge_number_in_a_raw_release(number: str, tmp_path: Path, refused: Refused) -> None:
    raw = tmp_path / "raw" / "qas" / "train"
    raw.mkdir(parents=True)
    (tmp_path / "root" / "PathVQA").mkdir(parents=True)
    (raw / "train_qa.json").write_text(f'[{{"image": "a", "question": "b", "answer": {number}}}]')
    message = refused("data", "prepare", "pathvqa", "--raw", str(tmp_path / "raw"), "--root", "root", "--annotations")
    assert "train_qa.json: not readable as json" in message


@pytest.mark.parametrize(
    ("key", "number"),
    [
        *(("rms_norm_eps", number) for number in HUGE.values()),
        *(
            (key, number)
            for key in ("num_hidden_layers", "hidden_size")
            for number in (*HUGE.values(), "0", "-4", "10000000000", "2.5")
        ),
    ],
)
def test_a_senseless_number_in_a_models_configuration(key: str, number: str, model: Path, refused: Refused) -> None:
    spoil(model / "config.json", key, number)
    message = refused("model", "inspect", str(model))
    assert f"{key} is" in message or "not acceptable JSON" in message


@pytest.mark.parametrize("number", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", ["lora_rank", "lora_alpha"])
def test_a_huge_number_in_a_banks_configuration(key: str, number: str, banks: Path, refused: Refused) -> None:
    spoil(banks / "pathvqa" / "config.json", key, number)
    assert "lora_rank and lora_alpha not found in mslora_cfg" in refused("bank", "show", str(banks / "pathvqa"))


# --- marks ---------------------------------------------------------------------------------------------------------


def test_an_image_mark_that_no_image_stands_for(data: Path, config_file: ConfigWriter, refused: Refused) -> None:
    path = data / "PathVQA" / "train.json"
    records = json.loads(path.read_text())
    records[2]["conversations"][1]["value"] += " <image>"
    path.write_text(json.dumps(records))
    message = refused("train", str(config_file()), f"data.root={data}", "--task", "pathvqa")
    assert f"{path}: record 2: field 'conversations[1].value': contains an <image> marker" in message


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../outside.png", "{}/outside.png", "images/../../../outside.png"])
@pytest.mark.parametrize("file", ["train.json", "test.jsonl"])
def test_an_annotation_that_leads_outside(
    file: str, name: str, data: Path, tmp_path: Path, config_file: ConfigWriter, refused: Refused
) -> None:
    shutil.copy(next((data / "PathVQA").rglob("*.png")), tmp_path / "outside.png")
    name = name.format(tmp_path)
    path = data / "PathVQA" / file
    first = json.loads(path.read_text())[0] if file == "train.json" else json.loads(path.read_text().splitlines()[0])
    first["image"] = name
    path.write_text(json.dumps([first]) if file == "train.json" else json.dumps(first) + "\n")
    (tmp_path / "raw").mkdir()
    message = refused("data", "prepare", "pathvqa", "--raw", str(tmp_path / "raw"), "--root", str(data))
    assert f"{file}: " in message and "expected a relative path below the data root" in message
    if file == "train.json":
        # The run folder is opened before images are looked at; nothing is trained.
        assert main(["train", str(config_file()), f"data.root={data}", "--task", "pathvqa"]) == 1
        assert not (tmp_path / "checkpoints" / "tiny" / "banks").exists()


@pytest.mark.parametrize("name", ["../evil.png", "/tmp/mslora-evil.png", "a/../../evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_would_escape(kind: str, name: str, data: Path, tmp_path: Path, refused: Refused) -> None:
    image = next((data / "PathVQA").rglob("*.png"))
    archive = tmp_path / f"raw.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(image, "images/fine.png")
            packed.write(image, "x")
            packed.infolist()[1].filename = name  # as zipfile itself would not write it
    else:
        with tarfile.open(archive, "w") as tar:
            tar.add(image, "images/fine.png")
            member = tarfile.TarInfo(name)
            member.size = image.stat().st_size
            with image.open("rb") as file:
                tar.addfile(member, file)
    shutil.rmtree(data / "PathVQA" / "images")
    message = refused("data", "prepare", "pathvqa", "--raw", str(archive), "--root", str(data))
    assert f"refused: member {name!r} would be extracted outside" in message
    assert not Path("/tmp/mslora-evil.png").exists()


def test_an_index_that_names_files_elsewhere(model: Path, refused: Refused) -> None:
    for name in ('"/etc/passwd"', '"../clip-tiny-patch14/model.safetensors"', "3"):
        (model / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"x": {name}}}}}')
        assert "model.safetensors.index.json" in refused("model", "inspect", str(model))


# --- images --------------------------------------------------------------------------------------------------------


def test_an_image_bomb(
    data: Path, tmp_path: Path, config_file: ConfigWriter, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((data / "PathVQA" / "train.json").read_text())
    target = data / "PathVQA" / records[0]["image"]
    target.unlink()
    bomb(target, 50_000, 50_000)
    assert target.stat().st_size < 200
    options = [f"data.root={data}", "data.check_images=true", "--task", "pathvqa"]
    assert main(["train", str(config_file(data={"root": str(data)})), *options]) == 1
    assert f"record 0: {target}: more than 80,000,000 pixels" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "tiny" / "banks").exists()
    assert main(["data", "check", str(data), "--only", "pathvqa", "--output", str(tmp_path / "check.json")]) == 1
    assert "more than 80,000,000 pixels" in capsys.readouterr().out
