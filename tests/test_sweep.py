"""`mslora-cr sweep`, on the tiny stream."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mslora_cr import sweep
from mslora_cr.banks.io import load_bank
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import method_names
from mslora_cr.config.schema import ConfigError
from mslora_cr.distributed import pool
from mslora_cr.evaluation.results import Cell, Evaluation
from mslora_cr.reporting.capacity import cost_of, frontier
from mslora_cr.reporting.sweep_page import write_sweep_page
from mslora_cr.reporting.sweep_result import SweepResult
from mslora_cr.runs.entries import RunLedger, TaskEntry
from mslora_cr.statistics.sweep_summary import summarize
from mslora_cr.stream.orders import latin_orders, task_orders
from mslora_cr.sweep import plan_sweep
from mslora_cr.utils.errors import UserError
from tests.conftest import once, write_config
from tests.helpers.report_run import Page

ARGUMENTS = ["--methods", "mslora_cr", "each", "--orders", "2", "--seeds", "1", "--jobs", "1"]


@pytest.fixture(scope="module")
def swept(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Path:
    """The folder of a finished sweep's configuration: 2 methods × 2 orders of two tasks, two steps each."""

    def build(folder: Path) -> None:
        tasks = [{**task, "epochs": 0.5} for task in tiny_settings["tasks"][:2]]
        config = write_config(folder, tiny_settings, run="sweep", tasks=tasks)
        assert main(["sweep", str(config), *ARGUMENTS]) == 0

    return once(shared_tmp / "swept", build)


def test_every_table_of_methods_says_their_rank(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Methods of different rank differ in capacity; two banks of rank 4 answer for mslora_cr, one for each."""
    lines = (swept / "results" / "sweep" / "sweep.md").read_text(encoding="utf-8").splitlines()
    heads = [line for line in lines if line.startswith("| method |")]
    measured = SweepResult.read(swept / "results" / "sweep" / "sweep.json").metrics
    assert {"choice", "balanced accuracy"} <= set(measured)
    assert len(heads) == len(measured) + 1 and all("| rank |" in head for head in heads)  # and that of the cost
    columns = next(line for line in lines if line.startswith("| order |")).split(" | ")[2:]
    ranks = next(line for line in lines if line.startswith("| | rank |")).split(" | ")[2:]
    found = {name.strip(" |"): rank.strip(" |") for name, rank in zip(columns, ranks, strict=True)}
    assert found == {"each": "4", "mslora\\_cr": "8"}
    capsys.readouterr()
    runs = [str(swept / "checkpoints" / "sweep" / f"{method}-order0-seed1") for method in ("each", "mslora_cr")]
    assert main(["compare", *runs]) == 0
    assert "Rank that answers after the last stage: each-order0-seed1 4, mslora_cr-order0-seed1 8;" in (
        capsys.readouterr().out
    )
    assert main(["compare", *(run.replace("checkpoints", "results") for run in runs)]) == 0
    assert "Rank that answers" not in capsys.readouterr().out  # a folder of results does not say


def test_every_run_is_there(swept: Path) -> None:
    found = json.loads((swept / "results" / "sweep" / "sweep.json").read_text())
    expected = [f"{method}-order{order}-seed1" for method in ("mslora_cr", "each") for order in (0, 1)]
    assert [run["run"] for run in found["runs"]] == expected
    assert [run["rank"] for run in found["runs"]] == [8, 8, 4, 4]  # two banks of rank 4, or one
    assert found["orders"] == {"0": ["pathvqa", "slake-vqarad"], "1": ["slake-vqarad", "pathvqa"]}
    for run in found["runs"]:
        folder = swept / "results" / "sweep" / run["run"]
        summary = json.loads((folder / "evaluation.json").read_text())
        assert summary["method"] == run["method"]
        assert summary["tasks"] == found["orders"][str(run["order"])]
        assert load_config(swept / "checkpoints" / "sweep" / run["run"] / "config.yaml").seed == run["seed"]
        last = {cell["task"]: cell["metrics"]["exact match score"] for cell in summary["cells"] if cell["stage"] == 2}
        figures = run["figures"]["exact"]
        assert figures["final"] == pytest.approx(last)
        assert figures["final_average"] == pytest.approx(sum(last.values()) / 2)
        banks = swept / "checkpoints" / "sweep" / run["run"] / "banks"
        numbers = sum(matrix.numel() for matrix in load_bank(banks / "pathvqa").tensors)
        assert run["parameters"] == numbers * (2 if run["method"] == "mslora_cr" else 1)
        assert run["device_hours"] == pytest.approx(run["seconds"] / 3600)  # one process


def test_what_belongs_to_one_method_goes_to_its_runs_alone(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config = write_config(tmp_path, tiny_settings)
    overrides = ["ewc.strength=7", "lora.rank=2"]
    runs = plan_sweep(config, overrides, ["mslora_cr", "ewc"])
    assert [(run.method, run.config.lora.rank) for run in runs] == [("mslora_cr", 2), ("ewc", 2)]
    assert runs[1].config.model_dump()["ewc"]["strength"] == 7
    with pytest.raises(ConfigError, match="ewc: belongs to method 'ewc', which is not in this sweep"):
        plan_sweep(config, overrides, ["mslora_cr"])
    with pytest.raises(ConfigError, match="method: a sweep sets it itself; name several with --methods"):
        plan_sweep(config, ["method=ewc"])
    with pytest.raises(ConfigError, match="run: a sweep sets it itself"):
        plan_sweep(config, ["run=mine"])
    with pytest.raises(ConfigError, match="seed: --seeds names them"):
        plan_sweep(config, ["seed=5"], seeds=[1, 2])
    assert {run.seed for run in plan_sweep(config, ["seed=5"])} == {5}


def test_the_pages_show_methods_orders_and_deviation(swept: Path, tmp_path: Path) -> None:
    root = swept / "results" / "sweep"
    page, text = Page(root / "sweep.html"), (root / "sweep.md").read_text()
    assert page.loads == []
    assert "2 methods, 2 orders, 1 seeds" in page.text
    assert "slake-vqarad → pathvqa" in page.text and "slake-vqarad → pathvqa" in text
    assert "Forgetting is zero by construction for each, mslora\\_cr" in text
    assert "| mslora\\_cr | prefix | 8 | 2 |" in text
    assert "Balanced accuracy of closed questions" in page.text and "balanced accuracy" in text.lower()
    assert (root / "sweep.svg").read_text().startswith("<svg") and ">each<" in (root / "frontier.svg").read_text()
    assert "Frontier of parameters of the banks that answer: " in page.text and "(frontier.svg)" in text
    content = json.loads((root / "sweep.json").read_text())
    content["metrics"]["choice"]["each"]["final_average"]["against"]["orders_interval"] = [-3.0, 5.0]
    # A method that never gives one of the answers has no predictive value after the last stage.
    content["metrics"]["balanced accuracy"]["each"] = {
        "own_stage_average": content["metrics"]["choice"]["each"]["forgetting"]
    }
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    page = Page(write_sweep_page(SweepResult.read(tmp_path / "sweep.json"), tmp_path))
    assert "less mslora_cr's, orders as a sample – [-3.0 to 5.0]" in page.text
    assert "| | less mslora_cr's, orders as a sample | – | [-3.0 to 5.0] |\n" in (tmp_path / "sweep.md").read_text()


def test_a_sweep_goes_on_and_a_run_that_fails_stops_no_other(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run is gone and has to come out the same, one has a broken bank, two are done."""
    shutil.copytree(swept, tmp_path / "copy")
    trained, results = (tmp_path / "copy" / part / "sweep" for part in ("checkpoints", "results"))
    shutil.rmtree(trained / "each-order1-seed1")
    shutil.rmtree(results / "each-order1-seed1")
    (trained / "each-order0-seed1" / "banks" / "pathvqa" / "adapter_model.safetensors").write_bytes(b"broken")
    banks = {path: path.stat().st_mtime_ns for path in trained.rglob("adapter_model.safetensors")}
    command = ["sweep", str(swept / "run.yaml"), *ARGUMENTS]
    command += [f"output_dir={trained.parent}", f"results_dir={results.parent}"]
    assert main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert plan.count("2 of 2 tasks learned and evaluated") == 3 and plan.count("to do") == 1
    assert "4 runs = 2 methods × 2 orders × 1 seeds, 1 at once (CPU)" in plan
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "1 of 4 runs failed" in message and "each-order0-seed1" in message
    assert "banks/pathvqa" in message
    assert all(path.stat().st_mtime_ns == time for path, time in banks.items())
    before, after = (
        {run["run"]: run["figures"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}
        for folder in (swept / "results" / "sweep", results)
    )
    del before["each-order0-seed1"]
    assert after == before


@pytest.mark.long
def test_a_sweep_may_be_task_agnostic(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(swept, tmp_path / "copy")
    trained, results = (tmp_path / "copy" / part / "sweep" for part in ("checkpoints", "results"))
    command = ["sweep", str(swept / "run.yaml"), "--methods", "mslora_cr", "--seeds", "1", "--jobs", "1"]
    command += [f"output_dir={trained.parent}", f"results_dir={results.parent}", "evaluation.banks_by=routed"]
    assert main([*command, "--dry-run"]) == 0
    assert "2 of 2 tasks learned\n" in capsys.readouterr().out  # task-aware answers are not these
    assert main(command) == 0
    [run] = json.loads((results / "sweep.json").read_text())["runs"]
    summary = json.loads((results / run["run"] / "routed" / "evaluation.json").read_text())
    assert summary["banks_by"] == run["banks_by"] == "routed"
    assert [(cell["task"], cell["stage"]) for cell in summary["cells"]] == [
        ("pathvqa", 1),
        ("pathvqa", 2),
        ("slake-vqarad", 2),
    ]
    last = {cell["task"]: cell["metrics"]["exact match score"] for cell in summary["cells"] if cell["stage"] == 2}
    assert run["figures"]["exact"]["final"] == pytest.approx(last)
    assert main([*command, "--dry-run"]) == 0
    assert "2 of 2 tasks learned and evaluated" in capsys.readouterr().out


# --- the plan --------------------------------------------------------------------------------------------------------


def test_orders_are_different_and_always_the_same() -> None:
    tasks = ["a", "b", "c"]
    assert task_orders(tasks, 1) == [("a", "b", "c")]
    found = task_orders(tasks, 6)
    assert len(set(found)) == 6 and found[0] == ("a", "b", "c")
    assert task_orders(tasks, 3) == found[:3]
    for count in (0, 7):
        with pytest.raises(ConfigError, match="3 tasks have 6 orders"):
            task_orders(tasks, count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_a_latin_square_is_balanced(count: int) -> None:
    """Every task stands equally often at every place, and directly behind every other task."""
    tasks = [f"task {number}" for number in range(count)]
    orders = latin_orders(tasks)
    assert orders[0] == tuple(tasks)
    assert len(orders) == len(set(orders)) == (count if count % 2 == 0 or count == 1 else 2 * count)
    for place in range(count):
        assert set(Counter(order[place] for order in orders).values()) == {len(orders) // count}
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1


def test_what_has_nothing_to_route_is_answered_by_prefix(config_file: Callable[..., Path]) -> None:
    runs = plan_sweep(config_file(), ["evaluation.banks_by=routed"], ["mslora_cr", "each", "sequential", "zero_shot"])
    assert [run.config.evaluation.banks_by for run in runs] == ["routed", "routed", "prefix", "prefix"]
    assert [run.results.name for run in runs[1:3]] == ["routed", "sequential-order0-seed42"]


def test_the_plan_of_a_file(config_file: Callable[..., Path]) -> None:
    runs = plan_sweep(config_file(seed=7))
    assert [run.method for run in runs] == list(method_names())
    assert {(run.order, run.seed, run.config.seed) for run in runs} == {(0, 7, 7)}
    assert runs[0].config.run_dir.parent.name == "tiny"
    with pytest.raises(ConfigError, match="unknown method 'mslora'; did you mean 'mslora_cr'"):
        plan_sweep(config_file(), methods=["mslora"])


def test_a_finished_run_has_learned_what_its_method_trains(config_file: Callable[..., Path]) -> None:
    """`joint` trains one bank for all tasks."""
    runs = plan_sweep(config_file(), methods=["joint"])
    task = {"digest": "", "steps": 1, "train_loss": 1.0, "seconds": 1.0, "finished": ""}
    ledger = {"run": runs[0].name, "method": "joint", "config_digest": "", "versions": {}, "git": None, "hardware": {}}
    runs[0].config.run_dir.mkdir(parents=True)
    (runs[0].config.run_dir / "ledger.json").write_text(json.dumps({**ledger, "tasks": {"pathvqa": task}}))
    assert "1 of 1 tasks learned" in sweep.describe(runs, [None])


@pytest.mark.parametrize(
    ("visible", "jobs", "expected"), [("0,1", None, ["0", "1"]), ("3,5", 3, ["3", "5", "3"]), ("2", 1, ["2"])]
)
def test_a_gpu_for_each_run(
    visible: str, jobs: int | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pool.devices("auto", jobs) == expected
    assert pool.devices("cpu", 2) == [None, None]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pool.devices("auto", 1) == [None]
    with pytest.raises(UserError, match=r"model\.device is cuda"):
        pool.devices("cuda", 1)


def test_a_cost_that_the_ledger_does_not_know_is_not_guessed() -> None:
    """Four processes for half an hour; an imported bank costs nothing; version 0.1.0 knew no processes."""
    entry = {"digest": "", "steps": 1, "train_loss": 1.0, "finished": ""}
    trained = TaskEntry(**entry, seconds=1800.0, processes=4, parameters=10)
    imported = TaskEntry(**entry, seconds=0.0, parameters=12)
    cell = {"stage": 2, "answers": "", "questions": "", "rows": 1, "fingerprint": "", "seconds": 1.0}
    cells = [
        Cell(**cell, task=task, banks=banks, metrics={}, intervals={})
        for task, banks in (("a", ("a",)), ("b", ("a", "b")))
    ]
    of_both = {"modalities": {"a": "x", "b": "x"}, "published": {"a": None, "b": None}}
    known = {"run": "r", "method": "mslora_cr", "tasks": ("a", "b"), "stages": (2,), **of_both}
    evaluation = Evaluation(**known, banks_by="prefix", cells=tuple(cells), environment={})
    for second, wanted in ((imported, (2.0, 22)), (TaskEntry(**entry, seconds=5.0), (None, None))):
        assert cost_of(evaluation, RunLedger(run="r", method="", tasks={"a": trained, "b": second})) == wanted
    assert cost_of(evaluation, None) == (None, None)


def test_the_frontier_by_hand() -> None:
    points = {"base": (0.0, 7.0), "slow": (3.0, 80.0), "worse": (2.0, 60.0), "quick": (1.0, 70.0), "equal": (4.0, 80.0)}
    assert frontier(points) == ["base", "quick", "slow"]


def test_spread_by_hand() -> None:
    """Two orders of two seeds: 80, 84 and 90, 94; MSLoRA-CR has 85 everywhere, but one run is not there."""
    values = {(0, 1): 80.0, (0, 2): 84.0, (1, 1): 90.0, (1, 2): 94.0}
    rows = [
        {"method": method, "order": order, "seed": seed, "figures": {"closed": {"final_average": value, "final": {}}}}
        for method, scores in (("other", values), ("mslora_cr", dict.fromkeys(list(values)[:3], 85.0)))
        for (order, seed), value in scores.items()
    ]
    found = summarize(rows, "closed")["other"]["final_average"]
    assert found["mean"] == 87 and found["runs"] == 4
    assert found["deviation"] == pytest.approx(((49 + 9 + 9 + 49) / 3) ** 0.5)
    assert found["by_order"] == {"0": 82, "1": 92}
    assert found["between_orders"] == pytest.approx(50**0.5)
    assert found["within_orders"] == pytest.approx(8**0.5)  # 4 · 2² over 4 - 2
    against = found["against"]
    assert (against["mean"], against["pairs"]) == (pytest.approx(-1 / 3), 3)
    assert against["deviation"] == pytest.approx(stdev(-5, -1, 5))
    # about the orders' means: squares of 8, one degree of freedom, three pairs
    assert against["interval"] == pytest.approx(
        (-1 / 3 - 12.706 * (8 / 3) ** 0.5, -1 / 3 + 12.706 * (8 / 3) ** 0.5), abs=0.01
    )
    assert against["orders_interval"] == pytest.approx((1 - 12.706 * 4, 1 + 12.706 * 4), abs=0.01)  # -3 and 5
    assert against["p"] == against["p_adjusted"] > 0.8 and against["p_flips"] == 1
    assert summarize(rows, "f1") == {}


def stdev(*values: float) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
