"""The demo's own path with a smaller stream, an untrained model and two tasks."""

import json
from functools import partial
from pathlib import Path

import pytest

from mslora_cr import demo
from mslora_cr.cli import main
from mslora_cr.data.synthetic import make_stream
from mslora_cr.tiny_model import make_tiny_llava_med

TASKS = ["pathvqa", "PCAM"]


def test_the_demo_compares_its_methods_and_goes_on_where_it_was(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "make_stream", partial(make_stream, train_images=8, test_images=4))
    monkeypatch.setattr(demo, "make_tiny_llava_med", partial(make_tiny_llava_med, pretrain_steps=0, progress=False))
    command = [
        *("demo", f"model.path={tiny_model}", f"data.root={tiny_data}", "data.check_images=false"),
        *(f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"),
        *(f"tasks=[{','.join(TASKS)}]", "tasks.*.epochs=0.5", "evaluation.max_new_tokens=2"),
    ]
    assert main(command) == 0
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert list(summary["methods"]) == list(demo.COMPARED)
    printed = capsys.readouterr().out
    for method in demo.COMPARED:
        ledger = json.loads((tmp_path / "runs" / method / "ledger.json").read_text())
        assert list(ledger["tasks"]) == TASKS
        cells = json.loads((tmp_path / "results" / method / "evaluation.json").read_text())["cells"]
        assert [(cell["task"], cell["stage"]) for cell in cells] == [("pathvqa", 1), ("pathvqa", 2), ("PCAM", 2)]
        assert (tmp_path / "results" / method / "report.html").is_file()
        accuracy = summary["methods"][method]["average_closed_accuracy"]
        assert 0 <= accuracy <= 100 and f"{accuracy:.1f} %" in printed
    assert summary["methods"]["mslora_cr"]["forgetting"] == 0  # its earlier banks are frozen
    page = tmp_path / "results" / "report.html"
    assert str(page.resolve()) in printed
    assert all(method in page.read_text(encoding="utf-8") for method in demo.COMPARED)

    banks = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("adapter_model.safetensors")}
    assert len(banks) == len(TASKS) * len(demo.COMPARED)
    assert main(command) == 0
    assert capsys.readouterr().out.count("already done, skipped") == len(banks)
    assert {file: file.stat().st_mtime_ns for file in banks} == banks
