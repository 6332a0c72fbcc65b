"""`mslora-cr model inspect`: what a base model's folder holds, and how its two towers differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mslora_cr.cli.main import main
from mslora_cr.models.inspect import inspect
from mslora_cr.models.llava_med import load
from tests.conftest import GOLDEN

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PREFIX = "model.vision_tower.vision_tower.vision_model."
NORM = "encoder.layers.0.layer_norm1.weight"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden base model, to be changed; its tower stands beside it."""
    for name in ("llava_med_tiny", "clip-tiny-patch14"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path / "llava_med_tiny"


def named_tower(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder.parent / "clip-tiny-patch14" / "model.safetensors")
    return {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}


def edit_shards(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for shard in SHARDS:
        tensors = load_file(folder / shard)
        edit(tensors)
        save_file(tensors, folder / shard, {"format": "pt"})


def inspected(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["model", "inspect", str(folder), *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_sizes_dtypes_vocabulary_and_template(capsys: pytest.CaptureFixture[str]) -> None:
    folder = GOLDEN / "llava_med_tiny"
    stored = {name: tensor for shard in SHARDS for name, tensor in load_file(folder / shard).items()}
    found = inspected(folder, capsys)
    assert found["layout"] == "llava_mistral"
    assert found["files"] == {shard: (folder / shard).stat().st_size for shard in SHARDS}
    assert found["tensors"] == len(stored)
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["parameters_by_dtype"] == {"BF16": found["parameters"]}
    assert found["vocabulary"] == {"rows": 32000, "pieces": 32000}
    assert found["template"] == "[INST] <image>\nQUESTION [/INST]"


def test_every_tensor_of_the_towers_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    folder = GOLDEN / "llava_med_tiny"
    ours = {
        name.removeprefix(PREFIX): tensor
        for shard in SHARDS
        for name, tensor in load_file(folder / shard).items()
        if name.startswith(PREFIX)
    }
    theirs = named_tower(folder)
    towers = inspected(folder, capsys, "--all")["towers"]
    expected = {name: (ours[name].float() - theirs[name].float()).abs().max().item() for name in ours}
    assert towers["compared"] and towers["named"] == "../clip-tiny-patch14"
    assert towers["tensors_in_shards"] == len(ours) == 71
    assert towers["differences"] == expected
    assert towers["largest_difference"] == max(expected.values()) > 0.1
    short = inspected(folder, capsys)["towers"]
    assert list(short["largest_differences"].items()) == sorted(expected.items(), key=lambda item: -item[1])[:8]


def test_equal_towers_and_one_changed_number(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = named_tower(copy)

    def same(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(PREFIX)]:
            tensors[name] = theirs[name.removeprefix(PREFIX)].float()
            if name == PREFIX + NORM:
                tensors[name][3] += 0.5

    edit_shards(copy, same)
    differences = inspected(copy, capsys, "--all")["towers"]["differences"]
    assert differences.pop(NORM) == pytest.approx(0.5)
    assert set(differences.values()) == {0.0}


def test_towers_of_other_tensors_or_shapes(copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if PREFIX + NORM in tensors:
            tensors[PREFIX + NORM] = torch.ones(7)
        if PREFIX + "post_layernorm.weight" in tensors:
            tensors[PREFIX + "extra.weight"] = tensors.pop(PREFIX + "post_layernorm.weight")

    edit_shards(copy, change)
    differences = inspect(copy)["towers"]["differences"]
    assert differences[NORM] == "[7] in the shards, [48] in the named tower"
    assert differences["extra.weight"] == "only in the shards"
    assert differences["post_layernorm.weight"] == "only in the named tower"


def test_what_cannot_be_compared_is_said(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy.parent / "clip-tiny-patch14")
    towers = inspect(copy)["towers"]
    assert not towers["compared"] and "mm_vision_tower is '../clip-tiny-patch14'" in towers["why"]
    (copy / "tokenizer.model").unlink()
    assert "neither tokenizer.model nor tokenizer.json" in inspect(copy)["vocabulary"]["pieces"]
    whole = load(GOLDEN / "llava_med_tiny", dtype=torch.float32)
    whole.model.save_pretrained(tmp_path / "transformers")
    found = inspect(tmp_path / "transformers")
    assert found["layout"] == "llava" and found["parameters_by_dtype"].keys() == {"F32"}
    assert found["towers"]["why"] == "there is only one tower"


def test_a_damaged_shard_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (copy / SHARDS[0]).read_bytes()
    (copy / SHARDS[0]).write_bytes(data[: len(data) // 2])
    assert main(["model", "inspect", str(copy)]) == 1
    assert f"{SHARDS[0]}: not a complete safetensors file" in capsys.readouterr().err
