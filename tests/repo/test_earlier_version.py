"""A run folder that version 0.1.0 made before the package was rearranged: it still resumes, evaluates, compares, reports.

Its stream has two finished tasks, evaluated at all stages, routed and analysed, and a third that was killed behind a
checkpoint. `expected_bank` is what that third task's bank became without a break.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mslora_cr.cli.main import main
from tests.conftest import GOLDEN

MADE = Path(__file__).parents[1] / "fixtures" / "run_0_1_0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder, where its relative paths lead from the working directory."""
    shutil.copytree(MADE, tmp_path / "made")
    (tmp_path / "made" / "model").symlink_to(GOLDEN)
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made" / "checkpoints" / "kept"


def test_a_task_killed_under_it_resumes_and_ends_as_it_would_have(run: Path) -> None:
    before = (run / "ledger.json").read_bytes()
    assert main(["train", "run.yaml"]) == 0
    ours = load_file(run / "banks" / "slake-vqarad" / "adapter_model.safetensors")
    theirs = load_file("expected_bank/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, matrix in ours.items():  # processors round differently
        torch.testing.assert_close(matrix, theirs[name], rtol=1e-4, atol=1e-5)
    rows = [json.loads(line)["step"] for line in (run / "logs" / "slake-vqarad.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows))
    old, new = json.loads(before)["tasks"], json.loads((run / "ledger.json").read_text())["tasks"]
    assert {name: new[name] for name in old} == old


def test_its_results_are_read_and_its_answers_are_not_asked_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = Path("results/kept/pathvqa/answers.json").read_bytes()
    answers = Path("results/kept/pathvqa/answer-file.jsonl").read_bytes()
    assert main(["evaluate", "run.yaml", "--stages", "all", "tasks=[pathvqa, PCAM]"]) == 0
    assert Path("results/kept/pathvqa/answer-file.jsonl").read_bytes() == answers
    assert Path("results/kept/pathvqa/answers.json").read_bytes() == stamp
    assert main(["evaluate", "run.yaml", "--banks-by", "routed", "tasks=[pathvqa, PCAM]"]) == 0
    assert main(["analyze", "run.yaml", "--questions", "4"]) == 0
    assert main(["compare", "results/kept", "results/kept/routed"]) == 0
    assert "pathvqa" in capsys.readouterr().out
    assert main(["report", "run.yaml"]) == 0
    earlier = json.loads((MADE / "results" / "kept" / "evaluation.json").read_text())
    rows = score_rows(Path("results/kept/report.md"))
    assert list(rows) == earlier["tasks"]
    for stage, task in enumerate(earlier["tasks"], start=1):
        [cell] = [cell for cell in earlier["cells"] if (cell["task"], cell["stage"]) == (task, stage)]
        assert rows[task]["questions"] == str(cell["rows"])
        for column, metric in (
            ("published closed accuracy", "close accuracy"),
            ("F1 of open answers", "f1 score"),
            ("exact match", "exact match score"),
        ):
            score = cell["metrics"].get(metric)
            assert rows[task][column].split()[0] == ("–" if score is None else f"{score:.2f}")


def score_rows(report: Path) -> dict[str, dict[str, str]]:
    """The rows of the table of scores, by task and column."""
    section = report.read_text(encoding="utf-8").partition("## Scores\n")[2].partition("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}
