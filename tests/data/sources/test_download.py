"""Downloads against a stand-in hub: resumed, recorded, and refused where they must be."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.catalog import catalog
from mslora_cr.data.sources.download import ANNOTATIONS, MODELS, download
from mslora_cr.utils.files import file_digest
from tests.helpers.hub import COMMIT, Hub, serving

DATASET = "datasets/VentusAislant/MSLoRA_CR"
CLIP = "models/openai/clip-vit-large-patch14-336"
LARGE = bytes(range(256)) * 100_000  # the hub's client writes in pieces of 10 MiB
CUT = 15_000_000


@pytest.fixture
def hub(monkeypatch):
    # The tests as a whole run offline.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    annotations = {f"{entry.folder}/train.json": b"[]" for entry in catalog().values()}
    annotations |= {f"{entry.folder}/test.jsonl": b"{}\n" for entry in catalog().values()}
    repos = {
        DATASET: {**annotations, "README.md": b"# Data", "images.zip": b"large"},
        CLIP: {"config.json": b"{}", "pytorch_model.bin": LARGE, "tf_model.h5": b"other"},
        "models/microsoft/llava-med-v1.5-mistral-7b": {
            "config.json": b"{}",
            "a.safetensors": b"x",
            "pytorch_model.bin": b"y",
        },
        "models/VentusAislant/MSLoRA_CR": {"finetune_lora_x/pathvqa/cl_lora.bin": b"bank", "README.md": b""},
    }
    with serving(repos) as server:
        yield server


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def start_of(asked: str) -> int:
    return int(asked.removeprefix("bytes=").rstrip("-"))


def test_annotations_are_fetched_recorded_and_not_fetched_again(hub: Hub, tmp_path):
    download(ANNOTATIONS, tmp_path, endpoint=hub.url)
    expected = [
        name for entry in catalog().values() for name in (f"{entry.folder}/train.json", f"{entry.folder}/test.jsonl")
    ]
    assert files(tmp_path) == sorted([*expected, "download.json"])
    record = json.loads((tmp_path / "download.json").read_text())
    assert (record["repo"], record["commit"], record["revision"]) == (
        "VentusAislant/MSLoRA_CR",
        COMMIT,
        "main",
    )
    assert set(record["files"]) == set(expected) and record["finished"]
    transfers = len(hub.transfers)
    download(ANNOTATIONS, tmp_path, endpoint=hub.url)
    assert len(hub.transfers) == transfers == 16


def test_a_broken_connection_is_resumed_within_a_run(hub: Hub, tmp_path):
    hub.cut["pytorch_model.bin"] = CUT
    target = download(MODELS["clip"], tmp_path, endpoint=hub.url)
    assert (target / "pytorch_model.bin").read_bytes() == LARGE
    first, second = (asked for path, asked in hub.transfers if path == "pytorch_model.bin")
    assert first is None and 0 < start_of(second) <= CUT
    assert files(tmp_path) == [
        f"openai/clip-vit-large-patch14-336/{n}" for n in ("config.json", "download.json", "pytorch_model.bin")
    ]


def test_a_download_that_stopped_goes_on_in_the_next_run(hub: Hub, tmp_path):
    hub.cut["pytorch_model.bin"] = CUT
    hub.dying.add("pytorch_model.bin")
    with pytest.raises(DataError, match="run the same command again to resume"):
        download(MODELS["clip"], tmp_path, endpoint=hub.url)
    target = tmp_path / "openai" / "clip-vit-large-patch14-336"
    record = json.loads((target / "download.json").read_text())
    assert record["finished"] is None and list(record["files"]) == ["config.json"]
    assert not (target / "pytorch_model.bin").exists()

    hub.dying.clear()
    hub.transfers.clear()
    download(MODELS["clip"], tmp_path, endpoint=hub.url)
    assert (target / "pytorch_model.bin").read_bytes() == LARGE
    [(path, asked)] = hub.transfers
    assert path == "pytorch_model.bin" and 0 < start_of(asked) <= CUT
    assert files(target) == ["config.json", "download.json", "pytorch_model.bin"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_damaged_files_are_noticed_and_fetched_anew(name, hub: Hub, tmp_path):
    hub.damaged.add(name)
    with pytest.raises(DataError, match=f"{name}: the download is damaged"):
        download(MODELS["clip"], tmp_path, endpoint=hub.url)
    target = tmp_path / "openai" / "clip-vit-large-patch14-336"
    assert not (target / name).exists()
    hub.damaged.clear()
    download(MODELS["clip"], tmp_path, endpoint=hub.url)
    assert (target / name).read_bytes() == hub.repos[CLIP][name]


def test_a_newer_commit_replaces_what_was_downloaded(hub: Hub, tmp_path):
    target = download(MODELS["clip"], tmp_path, endpoint=hub.url)
    hub.repos[CLIP]["config.json"] = b"[]"  # as long as before
    hub.transfers.clear()
    download(MODELS["clip"], tmp_path, endpoint=hub.url)
    assert (target / "config.json").read_bytes() == b"[]"
    assert [path for path, _ in hub.transfers] == ["config.json"]


def test_equal_files_of_another_source_are_taken_over(hub: Hub, tmp_path):
    target = tmp_path / "openai" / "clip-vit-large-patch14-336"
    target.mkdir(parents=True)
    (target / "pytorch_model.bin").write_bytes(LARGE)
    download(MODELS["clip"], tmp_path, endpoint=hub.url)
    assert [path for path, _ in hub.transfers] == ["config.json"]


def test_safetensors_are_preferred(hub: Hub, tmp_path):
    target = download(MODELS["llava_med_v1.5"], tmp_path, endpoint=hub.url)
    assert files(target) == ["a.safetensors", "config.json", "download.json"]


def test_annotations_of_another_source_are_not_overwritten(hub: Hub, tmp_path):
    built = tmp_path / "HAM" / "train.json"
    built.parent.mkdir()
    built.write_text("[my own]")
    with pytest.raises(DataError, match=r"HAM/train.json: was not downloaded from the hub"):
        download(ANNOTATIONS, tmp_path, endpoint=hub.url)
    assert built.read_text() == "[my own]" and files(tmp_path) == ["HAM/train.json"]


def test_no_access_no_repository_no_revision_no_connection(hub: Hub, tmp_path):
    with pytest.raises(DataError, match="no such revision"):
        download(ANNOTATIONS, tmp_path, revision="v9", endpoint=hub.url)
    with pytest.raises(DataError, match="not found, or not open"):
        download(replace(ANNOTATIONS, repo="some/other"), tmp_path, endpoint=hub.url)
    hub.gated.add(DATASET)
    with pytest.raises(DataError, match=r"request access at https://huggingface.co/datasets/Ventus"):
        download(ANNOTATIONS, tmp_path, endpoint=hub.url)
    with pytest.raises(DataError, match="the download stopped"):
        download(MODELS["clip"], tmp_path, endpoint="http://127.0.0.1:9")
    assert files(tmp_path) == []


def test_later_downloads_are_held_against_the_first(hub: Hub, tmp_path):
    """On another machine, that is in another folder, with the lock file alone."""
    lock = tmp_path / "assets.lock.json"
    first = download(MODELS["clip"], tmp_path / "first", endpoint=hub.url, lock=lock)
    locked = json.loads(lock.read_text())["assets"][CLIP]
    assert locked["revision"] == COMMIT
    assert locked["files"] == {
        name: {"size": (first / name).stat().st_size, "sha256": file_digest(first / name)}
        for name in ("config.json", "pytorch_model.bin")
    }
    before = lock.read_bytes()
    download(MODELS["clip"], tmp_path / "second", endpoint=hub.url, lock=lock)
    assert lock.read_bytes() == before

    hub.repos[CLIP]["config.json"] = b"[]"  # as long as before
    with pytest.raises(DataError, match=rf"config\.json: not as .* records for revision {COMMIT}.* --update"):
        download(MODELS["clip"], tmp_path / "third", endpoint=hub.url, lock=lock)
    assert lock.read_bytes() == before
    download(MODELS["clip"], tmp_path / "third", endpoint=hub.url, lock=lock, update=True)
    assert lock.read_bytes() != before


def test_another_revision_is_refused_before_anything_is_fetched(hub: Hub, tmp_path):
    lock = tmp_path / "assets.lock.json"
    download(MODELS["clip"], tmp_path / "first", endpoint=hub.url, lock=lock)
    content = json.loads(lock.read_text())
    content["assets"][CLIP]["revision"] = "an older one"
    lock.write_text(json.dumps(content))
    download(MODELS["clip"], tmp_path / "second", endpoint=hub.url, lock=lock)  # the same files under another commit
    hub.repos[CLIP]["pytorch_model.bin"] = LARGE[::-1]
    hub.transfers.clear()
    with pytest.raises(DataError, match=r"pytorch_model\.bin: not as"):
        download(MODELS["clip"], tmp_path / "third", endpoint=hub.url, lock=lock)
    assert hub.transfers == []


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"assets": {"models/openai/clip-vit-large-patch14-336": 3}}', "[" * 9999]
)
def test_a_damaged_lock_file_is_named(content, hub: Hub, tmp_path):
    (tmp_path / "lock").write_text(content)
    with pytest.raises(DataError, match="lock: not a lock file"):
        download(MODELS["clip"], tmp_path / "first", endpoint=hub.url, lock=tmp_path / "lock")


def test_file_names_that_lead_outside_are_refused(hub: Hub, tmp_path):
    hub.repos[DATASET]["../evil.json"] = b"[]"
    with pytest.raises(DataError, match=r"'../evil.json': expected a relative path"):
        download(ANNOTATIONS, tmp_path / "root", endpoint=hub.url)
    assert files(tmp_path) == []


def command(hub: Hub, folder: Path, kind: str, *words: str) -> subprocess.CompletedProcess:
    """`mslora-cr KIND download WORDS`, in a folder of its own."""
    repository = str(Path(__file__).parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": repository,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
    }
    code = [sys.executable, "-m", "mslora_cr", kind, "download", *words]
    return subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_commands_use_hf_endpoint_and_show_licences(hub: Hub, tmp_path):
    done = command(hub, tmp_path, "data")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/MSLoRA_CR/PCam/train.json").exists()
    for entry in catalog().values():
        assert entry.license in done.stdout and entry.source in done.stdout and entry.access in done.stdout
    done = command(hub, tmp_path, "model")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pretrained_models/llava_med_v1.5/config.json").exists()
    assert (tmp_path / "pretrained_models/openai/clip-vit-large-patch14-336/config.json").exists()
    assert (tmp_path / "checkpoints/finetune_lora_x/pathvqa/cl_lora.bin").exists()
    assert "licence: Apache-2.0" in done.stderr

    del hub.repos[DATASET]["CXP/test.jsonl"]
    lock = json.loads((tmp_path / "assets.lock.json").read_text())["assets"]
    assert len(lock) == 4 and lock[DATASET]["revision"] == COMMIT
    done = command(hub, tmp_path, "data", "--root", "other")
    assert done.returncode != 0 and "CXP/test.jsonl: not as assets.lock.json records" in done.stderr
    done = command(hub, tmp_path, "data", "--root", "other", "--update")
    assert done.returncode == 1 and "without annotations after the download: CXP" in done.stdout
