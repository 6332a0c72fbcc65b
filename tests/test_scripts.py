"""The six scripts, from the configurations shipped, with nothing but overrides of model, data and length."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RUNS = ("lora_each", "mslora_cr_ortho", "mslora_cr_ortho_6task")
TASKS = {"lora_each": 8, "mslora_cr_ortho": 8, "mslora_cr_ortho_6task": 6}


def script(name: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), "--gpus", "1", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_shipped_run_has_its_two_scripts() -> None:
    found = sorted(path.stem for path in (ROOT / "configs").glob("finetune_*.yaml"))
    assert found == [f"finetune_{run}" for run in sorted(RUNS)]
    scripts = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
    for run in RUNS:
        assert f"finetune_{run}.sh" in scripts
        assert f"eval_{run}.sh" in scripts
    every = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    assert every == sorted([*(f"finetune_{run}.yaml" for run in RUNS), "published.yaml", "demo.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_scripts_train_and_evaluate_their_run(run: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    places = [f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    length = ["tasks.*.epochs=0.01", "evaluation.max_new_tokens=2", "training.dataloader_num_workers=0"]
    assets = {"MODEL": str(tiny_model), "DATA": str(tiny_data)}
    script(f"finetune_{run}.sh", "--per-device-batch", "8", *places, *length, **assets)
    [folder] = (tmp_path / "runs").iterdir()
    ledger = json.loads((folder / "ledger.json").read_text())
    assert len(ledger["tasks"]) == TASKS[run]
    assert {entry["steps"] for entry in ledger["tasks"].values()} == {1}
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    shipped = yaml.safe_load((ROOT / "configs" / f"finetune_{run}.yaml").read_text())
    assert [task["batch_size"] for task in resolved["tasks"]] == [task["batch_size"] for task in shipped["tasks"]]
    assert resolved["lora"]["rank"] == 64

    again = script(f"finetune_{run}.sh", "--per-device-batch", "8", *places, *length, **assets)
    assert again.count("already done, skipped") == TASKS[run]

    script(f"eval_{run}.sh", *places, *length, **assets)
    [results] = (tmp_path / "results").iterdir()
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert len(evaluation["cells"]) == TASKS[run]
    expected_banks = 1 if run == "lora_each" else TASKS[run]
    assert len(evaluation["cells"][-1]["banks"]) == expected_banks
    for cell in evaluation["cells"]:
        assert (results / cell["task"] / "metrics.txt").is_file()


def test_launch_says_what_it_takes_and_refuses_an_unknown_launcher() -> None:
    help_text = subprocess.run(["bash", str(ROOT / "scripts" / "launch.sh")], capture_output=True, text=True).stdout
    assert "--per-device-batch" in help_text
    refused = subprocess.run(
        ["bash", str(ROOT / "scripts" / "finetune_lora_each.sh"), "--launcher", "mpirun"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "mpirun" in refused.stderr
