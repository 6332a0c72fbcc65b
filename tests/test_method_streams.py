"""Every method through the command line: trained, killed and started again, evaluated, reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.cli import main
from mslora_cr.config import load_config
from mslora_cr.methods import METHODS
from tests.conftest import STEPS, ConfigWriter, bank_bytes, once, write_config

Trained = Callable[[str], Path]


@pytest.fixture(scope="session")
def method_run(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Trained:
    """The configuration of a method's run on the tiny stream, trained and evaluated once. Read only."""

    def run(method: str) -> Path:
        def build(folder: Path) -> None:
            config = str(write_config(folder, tiny_settings, run=method, method=method))
            assert main(["train", config]) == 0
            assert main(["evaluate", config, "--stages", "all"]) == 0
            assert main(["report", config]) == 0

        return once(shared_tmp / f"method-{method}", build) / "run.yaml"

    return run


BANKS = {"zero_shot": 0}
"""How many banks a method trains, if not one per task."""
TERMS = {"mslora_cr": {"contrastive", "orthogonality", "alpha", "beta"}, "olora": {"overlap", "norm"}}
"""What a method's log shows of its second task beside the cross entropy."""


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_evaluates_and_reports(method: str, method_run: Trained) -> None:
    config = load_config(method_run(method))
    ledger = json.loads((config.run_dir / "ledger.json").read_text())
    assert ledger["method"] == method and len(ledger["tasks"]) == BANKS.get(method, 3)
    for task in ledger["tasks"]:
        rows = [json.loads(line) for line in (config.run_dir / "logs" / f"{task}.jsonl").open()]
        expected = TERMS.get(method, set()) if task != "pathvqa" else set()
        assert rows[0].keys() - {"step", "loss", "ce", "learning_rate", "grad_norm", "epoch"} == expected
    cells = json.loads((config.results_run_dir / "evaluation.json").read_text())["cells"]
    seen = {(cell["task"], cell["stage"]) for cell in cells}
    assert {(task, stage) for number, task in enumerate(STEPS, 1) for stage in range(number, 4)} <= seen
    page = (config.results_run_dir / "report.html").read_text()
    assert f"<code>{method}</code>" in page


def test_incremental_is_mslora_cr_without_its_terms(method_run: Trained, config_file: ConfigWriter) -> None:
    config = config_file(regularization={"alpha": 0, "beta": 0})
    assert main(["train", str(config)]) == 0
    assert bank_bytes(load_config(config).run_dir) == bank_bytes(load_config(method_run("incremental")).run_dir)


def test_zero_shot_trains_nothing_and_says_so(config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(config_file(method="zero_shot"))
    assert main(["train", config]) == 0
    assert "zero_shot trains nothing" in capsys.readouterr().out
    assert main(["train", config, "--task", "PCAM"]) == 1
    assert "--task PCAM: method zero_shot trains no bank for it; it trains nothing" in capsys.readouterr().err
