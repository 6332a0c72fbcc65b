"""`mslora-cr push` against the stand-in hub, and the model card."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.data.sources.leaks import Leaks, remember
from mslora_cr.data.tasks import test_records as records_of
from mslora_cr.serving.card import OVERLAP
from mslora_cr.serving.push import PushError, push
from tests.helpers.hub import Hub, serving

REPO, BASE = "lab/stream", "lab/llava-med-hf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the tests as a whole run offline
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_DISABLE_XET", True
    )  # weights go by LFS, which the hub takes too
    monkeypatch.setenv("HF_TOKEN", "writer")
    with serving({}) as server:
        yield server


def head(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_adapters_go_to_a_private_repository_with_their_card(hub: Hub, trained_config: Path, tmp_path: Path) -> None:
    config = mslora_cr.load_config(trained_config, [f"results_dir={tmp_path}"])
    results = mslora_cr.evaluate(config)
    copied = shutil.copytree(config.data.root, tmp_path / "data")
    config = mslora_cr.load_config(trained_config, [f"results_dir={tmp_path}", f"data.root={copied}"])
    opened = records_of(config, config.task("PCAM"))
    leaks = Leaks(train="", test=opened.digest, images=1, contents=0, patients=0, questions=2, test_questions=8)
    remember(opened.path.parent, leaks)
    address = push(config, REPO, base=BASE, endpoint=hub.url)
    assert address == f"{hub.url}/{REPO}" and hub.private == {f"models/{REPO}"}
    files = hub.repos[f"models/{REPO}"]
    wanted = {f"{task}/{name}" for task in ("pathvqa", "slake-vqarad", "PCAM") for name in ADAPTER}
    assert set(files) == wanted | {"README.md"}
    weights = [files[f"{task}/adapter_model.safetensors"] for task in ("pathvqa", "slake-vqarad", "PCAM")]
    assert {hashlib.sha256(content).hexdigest() for content in weights} == set(hub.objects)
    adapter = json.loads(files["PCAM/adapter_config.json"])
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (12, BASE)
    card = files["README.md"].decode()
    front_matter = head(card)
    assert (front_matter["base_model"], front_matter["base_model_relation"], front_matter["library_name"]) == (
        BASE,
        "adapter",
        "peft",
    )
    assert {"lora", "medical", "pathology", "radiology"} <= set(front_matter["tags"])
    [index] = front_matter["model-index"]
    rows = {
        (result["dataset"]["type"], metric["name"]): metric
        for result in index["results"]
        for metric in result["metrics"]
    }
    scores = {(row["task"], OVERLAP.get(row["metric"], row["metric"])): row for row in results.scores()}
    assert ("pathvqa", "word-overlap recall") in rows and "nor the sensitivity of a diagnosis" in card
    assert "**PCAM**: the data check found that 2 of 8 test questions" in card and "**pathvqa**" not in card
    assert not re.search(r"\| (precision|recall) \|", card)
    assert rows.keys() == scores.keys()
    for key, metric in rows.items():
        assert metric["value"] == pytest.approx(scores[key]["score"], abs=0.01)
        assert metric["args"]["low"] == pytest.approx(scores[key]["low"], abs=0.01)
    for line in ("Not for clinical use", "SLAKE CC BY 4.0, VQA-RAD CC0 1.0", 'subfolder="pathvqa"', "rank: 4"):
        assert line in card
    assert "writer" not in card and str(trained_config.parent) not in card
    assert not list(config.run_dir.glob(".push*"))


ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "export.json")


def test_one_merged_model_stands_at_the_top(hub: Hub, trained_config: Path) -> None:
    config = mslora_cr.load_config(trained_config)
    push(config, REPO, "merged", task="PCAM", base=BASE, public=True, endpoint=hub.url)
    files = hub.repos[f"models/{REPO}"]
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= set(files) and not hub.private
    card = files["README.md"].decode()
    assert head(card)["base_model_relation"] == "finetune" and "have not been evaluated" in card
    assert f'LlavaForConditionalGeneration.from_pretrained("{REPO}", dtype="auto")' in card


def test_a_dry_run_writes_the_card_alone(hub: Hub, trained_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["push", str(trained_config), REPO, "--base", BASE, "--dry-run"]) == 0
        card = Path(capsys.readouterr().out.strip())
        assert card == trained_config.parent / "checkpoints" / "tiny" / "model_card.md"
        assert "# tiny" in card.read_text() and not hub.repos
    finally:
        card.unlink()


def test_what_is_wrong_is_told(
    hub: Hub, trained_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([REPO], "name it with --base OWNER/NAME"),
        (["no name", "--base", BASE], "REPO: "),
        ([REPO, "--base", BASE, "--stage", "0"], "no adapter to write"),
    ):
        assert main(["push", str(trained_config), *arguments]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "reader")
    with pytest.raises(PushError, match=r"not let this account write there \(HTTP 403\); log in with `hf auth login`"):
        push(mslora_cr.load_config(trained_config), REPO, task="pathvqa", base=BASE, endpoint=hub.url)
    assert not hub.repos
