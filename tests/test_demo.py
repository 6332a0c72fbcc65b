"""The demo's own path with a smaller stream, an untrained model and two tasks; and the demo as it is shipped."""

import json
from functools import partial
from pathlib import Path

import pytest

from mslora_cr import demo
from mslora_cr.cli.main import main
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.synthetic.model import MODEL_FOLDER, make_tiny_llava_med
from mslora_cr.synthetic.stream import make_stream
from mslora_cr.utils.logs import set_up

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
    assert capsys.readouterr().err.count("already done, skipped") == len(banks)
    assert {file: file.stat().st_mtime_ns for file in banks} == banks
    again = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert again == summary  # its time too: that of the work, not of finding it done

    (tmp_path / "results" / "summary.json").unlink()  # as if killed at the last moment
    assert main(command) == 0
    ledgers = [json.loads((tmp_path / "runs" / method / "ledger.json").read_text()) for method in demo.COMPARED]
    trained = sum(entry["seconds"] for ledger in ledgers for entry in ledger["tasks"].values())
    assert json.loads((tmp_path / "results" / "summary.json").read_text())["seconds"] > trained


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=ewc", "method: the demo always compares mslora_cr and sequential"),
        ("run=x", "run: the demo always compares"),
        ("evaluation.banks_by=routed", "mslora-cr evaluate demo --banks-by routed"),
        ("tasks=[nmi, iu-x-ray]", "tasks: the demo compares closed questions, and none of these tasks has any"),
        ("model.path=elsewhere", "model.path: the demo makes its own model"),
        ("model.device=cuda", "model.device is cuda"),
    ],
)
def test_the_demo_refuses_before_it_makes_anything(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", override]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.long
def test_the_shipped_demo_shows_what_the_method_is_for(tmp_path: Path) -> None:
    """With its first two tasks, to save time, and other folders: it learns, does not forget, and its
    task-agnostic answers are as good."""
    places = [
        *(f"model.path={tmp_path / 'models' / MODEL_FOLDER}", f"data.root={tmp_path / 'data'}"),
        *(f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"),
        "tasks=[pathvqa,slake-vqarad]",
    ]
    assert main(["demo", *places]) == 0
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary.keys() == {"version", "methods", "seconds"} and summary["methods"].keys() == {
        "mslora_cr",
        "sequential",
    }
    ours, sequential = summary["methods"]["mslora_cr"], summary["methods"]["sequential"]
    assert ours.keys() == sequential.keys() == {"average_closed_accuracy", "forgetting"}
    assert ours["average_closed_accuracy"] >= 85
    assert ours["forgetting"] == 0
    assert sequential["forgetting"] >= 20

    assert main(["evaluate", str(demo.CONFIG), "--banks-by", "routed", *places]) == 0
    routed = read_evaluation(tmp_path / "results" / "mslora_cr" / "routed")
    matrix = routed.matrix("close accuracy") if routed else None
    assert matrix is not None
    assert matrix.final_average() == pytest.approx(ours["average_closed_accuracy"], abs=3)


def test_the_demo_prefers_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a GPU: a step of its tiny model is nothing but launches there."""
    set_up()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert {config.model.device for config in demo._configurations([]).values()} == {"cpu"}
    assert capsys.readouterr().err.count("model.device=cuda") == 1
    assert {config.model.device for config in demo._configurations(["model.device=cuda"]).values()} == {"cuda"}
    assert capsys.readouterr().err == ""
