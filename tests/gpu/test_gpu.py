"""What needs a GPU: `make test-gpu`. Further tests marked `gpu` stand beside their subjects."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import step
from mslora_cr import demo
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.synthetic.model import MODEL_FOLDER, make_tiny_llava_med
from mslora_cr.synthetic.stream import make_stream
from tests.conftest import GOLDEN, ConfigWriter, bank_bytes, needs_gpu
from tests.distributed.conftest import FIXED, write_exact_config
from tests.distributed.launch import compare_runs, deepspeed_file
from tests.golden import replay
from tests.helpers.killing import KillPoint, run_until_killed

pytestmark = [pytest.mark.gpu, needs_gpu]

ROOT = Path(__file__).parents[2]
CUDA = "model.device=cuda"
TASKS = ("pathvqa", "slake-vqarad")
TWO = f"tasks=[{', '.join(TASKS)}]"
BFLOAT16 = ("model.dtype=bfloat16", "training.bf16=true", "lora.dropout=0")
SECONDS = 600


def train_alone(config: Path, *overrides: str) -> Path:
    """Train in one process without a launcher; the run folder."""
    assert main(["train", str(config), CUDA, TWO, *overrides]) == 0
    return load_config(config).run_dir


def tensors(run: Path, task: str) -> dict[str, torch.Tensor]:
    return load_file(run / "banks" / task / "adapter_model.safetensors")


def test_golden_numbers_are_met() -> None:
    assert replay.main([str(GOLDEN), "--device", "cuda"]) == 0


@pytest.mark.parametrize(
    ("stage", "tolerance"), [("zero1", 1e-5), ("zero2", 1e-5), ("zero3", 1e-4), ("zero3_offload", 1e-4)]
)
def test_one_rank_under_deepspeed_gives_the_numbers_of_none(
    stage: str, tolerance: float, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    alone = train_alone(write_exact_config(tmp_path / "alone", tiny_settings, FIXED))
    config = write_exact_config(tmp_path / stage, tiny_settings, FIXED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
        "-m",
        "mslora_cr",
    ]
    command += ["train", str(config), CUDA, TWO, *deepspeed_file(stage, tmp_path / stage)]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}  # tests' own: cpu
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    compare_runs(load_config(config).run_dir, alone, TASKS, tolerance)


@pytest.mark.parametrize("dropout", ["0", "0.05"], ids=["fused", "peft"])
def test_a_killed_run_ends_in_the_same_banks(dropout: str, config_file: ConfigWriter, tmp_path: Path) -> None:
    whole = train_alone(config_file(run="whole"), f"lora.dropout={dropout}")
    config = config_file()
    command = ["train", str(config), CUDA, TWO, f"lora.dropout={dropout}"]
    point = KillPoint("mslora_cr.training.callbacks:JsonLinesCallback.on_log", call=8, after=True)
    run_until_killed(command, point, tmp_path / "output")
    assert main(command) == 0
    assert bank_bytes(load_config(config).run_dir) == bank_bytes(whole)


@pytest.mark.parametrize("layer", ["fused", "peft"])
def test_a_run_in_bfloat16_ends_near_that_in_float32(layer: str, config_file: ConfigWriter) -> None:
    dropout = {"fused": "0", "peft": "1e-9"}[layer]
    exact = train_alone(config_file(run="exact"), "lora.dropout=0")
    run = train_alone(config_file(), *BFLOAT16, f"lora.dropout={dropout}")
    assert f'"bank_layer": "{layer}"' in (run / "ledger.json").read_text()
    for task in TASKS:
        logs = [[json.loads(line) for line in (folder / "logs" / f"{task}.jsonl").open()] for folder in (run, exact)]
        for row, wanted in zip(*logs, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=0.05)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_trained_on(bits: str, config_file: ConfigWriter) -> None:
    pytest.importorskip("bitsandbytes")
    run = train_alone(config_file(), f"model.quantization={bits}", *BFLOAT16, "training.gradient_checkpointing=true")
    assert '"bank_layer": "peft"' in (run / "ledger.json").read_text()
    for task in TASKS:
        assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors(run, task).values())


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ligers_kernels_train_nearly_the_same_and_are_noted(config_file: ConfigWriter) -> None:
    plain = train_alone(config_file(run="plain"), *BFLOAT16, "model.kernels=torch")
    liger = train_alone(config_file(), *BFLOAT16)
    assert '"kernels": "liger"' in (liger / "ledger.json").read_text()
    losses = [[json.loads(line)["loss"] for line in (run / "logs" / "pathvqa.jsonl").open()] for run in (plain, liger)]
    assert losses[1] == [pytest.approx(loss, rel=0.02) for loss in losses[0]]
    # Continuing with the other kernels is refused.
    config = config_file()
    assert main(["train", str(config), CUDA, "tasks=[pathvqa, slake-vqarad, PCAM]", "model.kernels=torch"]) == 1


def test_how_many_layers_are_recomputed_is_measured(
    config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = train_alone(config_file(run="all"), *BFLOAT16, "training.gradient_checkpointing=true")
    chosen = train_alone(config_file(), *BFLOAT16, "training.gradient_checkpointing=auto")
    assert "GB for each layer that is stored" in capsys.readouterr().err
    assert '"recomputed_layers": 0' in (chosen / "ledger.json").read_text()  # so small a model fits
    for task in TASKS:
        ours, theirs = tensors(chosen, task), tensors(everything, task)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_stream", partial(make_stream, train_images=8, test_images=4))
    monkeypatch.setattr(demo, "make_tiny_llava_med", partial(make_tiny_llava_med, pretrain_steps=0, progress=False))
    command = ["demo", CUDA, f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    command += [f"model.path={tmp_path / 'model' / MODEL_FOLDER}", f"data.root={tmp_path / 'data'}", TWO]
    assert main([*command, "tasks.*.epochs=0.5", "evaluation.max_new_tokens=2"]) == 0
    assert (tmp_path / "results" / "summary.json").is_file()


def test_a_step_is_timed(tmp_path: Path) -> None:
    found = step.main(["--size", "tiny", "--repetitions", "1", "--device", "cuda"])
    assert all(value > 0 for value in found["ratios"].values())
