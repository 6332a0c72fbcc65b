import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "link_assets.sh"


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the script in it, and assets in others."""
    shutil.copytree(SCRIPT.parent, tmp_path / "clone" / "scripts")
    for name in ("data", "model", "openai/clip-vit-large-patch14-336"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    (tmp_path / "assets/model/config.json").write_text("{}")
    return tmp_path / "clone"


def run(clone: Path, **changes: str) -> subprocess.CompletedProcess:
    assets = clone.parent / "assets"
    places = {
        "MSLORA_DATA": assets / "data",
        "LLAVA_MED_V1_5": assets / "model",
        "CLIP_PATH": assets / "openai",
    }
    wanted = {name: str(place) for name, place in (places | changes).items()}
    environment = {"PATH": os.environ["PATH"], **wanted}
    # From elsewhere: the links belong to the clone, not to the folder one happens to be in.
    command = ["bash", str(clone / "scripts/link_assets.sh")]
    return subprocess.run(command, cwd=clone.parent, env=environment, capture_output=True, text=True)


def test_links_are_made_once_and_may_be_made_again(clone):
    for _ in range(2):
        done = run(clone)
        assert done.returncode == 0, done.stderr
    assets = clone.parent / "assets"
    assert (clone / "data/MSLoRA_CR").readlink() == assets / "data"
    assert (clone / "pretrained_models/llava_med_v1.5").readlink() == assets / "model"
    assert (clone / "pretrained_models/openai").readlink() == assets / "openai"
    assert (clone / "checkpoints").is_dir()
    assert list((assets / "data").iterdir()) == []  # no link inside the old target


def test_a_link_follows_when_the_variable_changes(clone):
    run(clone)
    other = clone.parent / "other"
    other.mkdir()
    assert run(clone, MSLORA_DATA=str(other)).returncode == 0
    assert (clone / "data/MSLoRA_CR").readlink() == other


def test_what_is_missing_is_said(clone):
    done = run(clone, MSLORA_DATA=str(clone.parent / "nowhere"), CLIP_PATH="")
    assert done.returncode == 1
    assert "MSLORA_DATA names" in done.stderr and "nowhere" in done.stderr
    assert "pretrained_models/openai: set CLIP_PATH" in done.stderr
    assert (clone / "pretrained_models/llava_med_v1.5").exists()  # the rest is linked all the same
    (clone.parent / "assets/model/config.json").unlink()
    assert "missing  pretrained_models/llava_med_v1.5/config.json" in run(clone).stderr


def test_a_real_folder_is_never_replaced(clone):
    (clone / "data/MSLoRA_CR").mkdir(parents=True)
    (clone / "data/MSLoRA_CR/precious").write_text("x")
    done = run(clone)
    assert done.returncode == 1 and "refused  data/MSLoRA_CR is not a link" in done.stderr
    assert (clone / "data/MSLoRA_CR/precious").read_text() == "x"
    assert run(clone, MSLORA_DATA="").returncode == 0
