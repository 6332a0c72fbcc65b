"""What `mslora-cr export` writes answers elsewhere as `evaluate` does here, in a process without this package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.models.llava_med import load as load_base
from mslora_cr.models.transformers_layout import portable_tokenizer
from tests.conftest import GOLDEN, ConfigWriter, bank_bytes

READER = Path(__file__).parents[1] / "helpers" / "answers_elsewhere.py"
CHECKPOINTS = GOLDEN / "checkpoints"
Cases = tuple[list[dict[str, Any]], list[list[int]]]
"""Questions for another process, and the ids that it must answer with."""


def elsewhere(cases: list[dict[str, Any]], tmp_path: Path) -> list[list[int]]:
    """The ids that transformers and PEFT alone answer with."""
    asked, ids_file = tmp_path / "cases.json", tmp_path / "ids.json"
    asked.write_text(json.dumps(cases))
    command = [sys.executable, "-P", str(READER), str(asked), str(ids_file)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(ids_file.read_text())


def golden_questions() -> list[dict[str, Any]]:
    records = {record["id"]: record for record in json.loads((GOLDEN / "conversations.json").read_text())}
    found = []
    for item in json.loads((GOLDEN / "generations.json").read_text()):
        record = records[item["id"]]
        images = record["image"] if isinstance(record["image"], list) else [record["image"]]
        question = record["conversations"][0]["value"].replace("<image>", "").strip()
        found.append(
            {
                "image": str(GOLDEN / images[0]),
                "question": question,
                "ids": item["output_ids"][1:],
                "banks": item["banks"],
            }
        )
    return found


@pytest.fixture
def golden_run(tmp_path: Path, tiny_settings: dict[str, Any], config_file: ConfigWriter) -> Path:
    """The golden banks as a finished run."""
    names = ["pathvqa", "slake-vqarad", "derm", "PCAM"]
    published = json.loads((CHECKPOINTS / "pathvqa" / "config.json").read_text())["mslora_cfg"]
    shape = {"rank": published["lora_rank"], "alpha": published["lora_alpha"]}
    tasks = [{"name": name, "epochs": 1, "batch_size": 4, "learning_rate": 0.001} for name in names]
    model = {**tiny_settings["model"], "path": str(GOLDEN / "llava_med_tiny")}
    config = config_file(run="golden", model=model, lora=shape, tasks=tasks, datasets={})
    assert main(["bank", "import", str(config), "--from", str(CHECKPOINTS)]) == 0
    return config


def golden_cases(golden_run: Path, tmp_path: Path) -> Cases:
    """Every third golden question, of the models and the adapters that are exported here."""
    for kind in ("peft", "merged"):
        assert main(["export", str(golden_run), "--output", str(tmp_path / kind), "--format", kind]) == 0
    for folder in ("peft/base", "merged/pathvqa"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == ["LlavaForConditionalGeneration"]  # vLLM and llama.cpp serve by it
        tokenizer = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert isinstance(tokenizer["extra_special_tokens"], dict), "as transformers 4 reads it"
    names = ["pathvqa", "slake-vqarad", "derm", "PCAM"]
    cases, wanted = [], []
    for question in golden_questions()[::5]:
        folder = names[question["banks"] - 1]
        for kind in ("peft", "merged"):
            place = tmp_path / kind / folder
            known = (
                {"model": str(tmp_path / "peft" / "base"), "adapter": str(place)}
                if kind == "peft"
                else {"model": str(place)}
            )
            cases.append({**known, "images": [question["image"]], "question": question["question"], "tokens": 12})
            wanted.append(question["ids"])
    assert len({case["model"] for case in cases}) > 3
    return cases, wanted


def embedded_cases(trained_config: Path, tmp_path: Path) -> Cases:
    """Questions of the embedded stream, of several rounds and of several pictures too."""
    out = tmp_path / "out"
    assert main(["export", str(trained_config), "--output", str(out / "peft"), "--format", "peft"]) == 0
    for task in ("pathvqa", "PCAM"):
        assert (
            main(["export", str(trained_config), "--output", str(out / "merged"), "--format", "merged", "--task", task])
            == 0
        )
    model = mslora_cr.load(trained_config)
    data = Path(model.config.data.root)
    cases, wanted = [], []
    for task in ("pathvqa", "PCAM"):
        folder = data / model.config.task(task).folder
        for row in [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:3]:
            image = str(folder / row["image"])
            asked = {"images": [image], "question": row["text"], "tokens": 4}
            cases.append({**asked, "model": str(out / "merged" / task)})
            cases.append(
                {**asked, "model": str(out / "peft" / "base"), "adapter": str(out / "peft" / task), "auto": True}
            )
            ids = list(model.ask(image, row["text"], task=task).ids)
            wanted += [ids, ids]
    first = cases[0]
    history = [["What is it?", "A slide."]]
    cases.append({**first, "history": history})
    wanted.append(
        list(model.ask(first["images"], first["question"], "pathvqa", history=[("What is it?", "A slide.")]).ids)
    )
    cases.append({**first, "images": first["images"] * 2})
    wanted.append(list(model.ask(first["images"] * 2, first["question"], "pathvqa").ids))
    return cases, wanted


def test_golden_and_embedded_answers_come_from_peft_and_from_merged_models(
    golden_run: Path, trained_config: Path, tmp_path: Path
) -> None:
    golden, embedded = golden_cases(golden_run, tmp_path), embedded_cases(trained_config, tmp_path)
    assert elsewhere(golden[0] + embedded[0], tmp_path) == golden[1] + embedded[1]
    out = tmp_path / "out"
    adapter = json.loads((out / "peft" / "PCAM" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (12, 12.0)
    assert adapter["base_model_name_or_path"] == str((out / "peft" / "base").resolve())
    with safe_open(out / "peft" / "base" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    # vLLM's names of the tower; the transformers that answered above reads them too.
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert not {"use_dora", "alora_invocation_tokens", "corda_config", "eva_config"} & adapter.keys()


def test_the_vocabulary_keeps_its_length_and_the_picture_its_piece(tiny_model: Path) -> None:
    for folder, pieces in ((tiny_model, 1024), (GOLDEN / "llava_med_tiny", 32000)):
        base = load_base(folder)
        tokenizer = portable_tokenizer(base)
        assert (len(tokenizer), tokenizer.convert_tokens_to_ids("<0x00>")) == (pieces, 3) and base.image_token_id == 3
        text = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text()
        for part in (text, "a  b", "   ", "é ü 細胞 🙂", "x<s>y</s> z", "\t1.25e-3\r\n"):
            assert tokenizer(part, add_special_tokens=False).input_ids == base.tokenizer.encode(part)


def test_published_checkpoints_come_back_as_banks(
    trained_config: Path, config_file: ConfigWriter, tmp_path: Path
) -> None:
    assert main(["export", str(trained_config), "--output", str(tmp_path / "out"), "--format", "published"]) == 0
    copy = config_file(lora={"rank": 4, "alpha": 8, "dropout": 0.05})
    assert main(["bank", "import", str(copy), "--from", str(tmp_path / "out" / "tiny")]) == 0
    assert bank_bytes(tmp_path / "checkpoints" / "tiny") == bank_bytes(trained_config.parent / "checkpoints" / "tiny")


def test_what_cannot_be_exported_is_refused(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own" / "pathvqa").mkdir(parents=True)
    (tmp_path / "own" / "pathvqa" / "notes.txt").touch()
    for arguments, message in (
        (["--format", "peft", "--stage", "0"], "no adapter to write"),
        (["--format", "merged", "--stage", "9"], "do not reach stage 9; there are 0, 1, 2, 3"),
        (["--format", "published", "--stage", "1"], "leave --task and --stage out"),
        (["--format", "merged", "--base", "x"], "--base belongs to --format peft"),
        (["--format", "peft", "--base", "x", "--task", "pathvqa"], "not an export of this program"),
    ):
        assert main(["export", str(trained_config), "--output", str(tmp_path / "own"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "own").rglob("*")] == ["pathvqa", "notes.txt"]
