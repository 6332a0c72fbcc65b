"""`mslora-cr analyze` and what the report shows of it, on the tiny run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mslora_cr.analysis import analyze as module
from mslora_cr.analysis.analyze import _change, _dropped
from mslora_cr.banks.io import load_bank
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.evaluation.score import read_answers
from mslora_cr.metrics.published import score_answers
from mslora_cr.reporting.heatmaps import contribution_map
from mslora_cr.statistics.intervals import independent
from tests.conftest import once, write_config
from tests.evaluation.test_evaluate import QUESTIONS, TASKS
from tests.helpers.report_run import Page, make_run


@pytest.fixture(scope="module")
def analyzed(trained_config: Path, shared_tmp: Path, tiny_settings: dict[str, Any]) -> Path:
    """The results folder of the trained run, evaluated task-aware and task-agnostic, and analysed."""

    def build(folder: Path) -> None:
        command = [str(trained_config), f"results_dir={folder}", "evaluation.max_new_tokens=6"]
        bare = write_config(folder.parent / "bare", tiny_settings, regularization={"alpha": -1, "beta": 0}, run="bare")
        assert main(["train", str(bare)]) == 0
        assert main(["evaluate", *command, "--stages", "seen"]) == 0
        assert main(["evaluate", *command, "--banks-by", "routed"]) == 0
        assert main(["analyze", *command, "--questions", "4", "--against", str(bare)]) == 0

    return once(shared_tmp / "analyzed", build) / "tiny"


def test_every_bank_is_left_out_of_every_task_that_it_answers(analyzed: Path, trained_config: Path) -> None:
    found = json.loads((analyzed / "analysis.json").read_text())["contribution"]
    assert [(row["task"], row["dropped"]) for row in found["rows"]] == [
        (task, dropped) for number, task in enumerate(TASKS, 1) for dropped in TASKS[:number]
    ]
    assert {row["questions"] for row in found["rows"]} == {4}
    # The answers without a bank are those that folding the others gives.
    asked = read_answers(analyzed / "analysis" / "answer-file.jsonl")
    assert len(asked) == 4 * (2 + 3 + 4)
    whole = read_answers(analyzed / "PCAM" / "answer-file.jsonl")
    assert [answer.text for answer in asked[20:24]] == [answer.text for answer in whole]
    for row in found["rows"]:
        assert row["contribution"] == pytest.approx(row["with_all"] - row["without"])
        assert row["interval"][0] <= row["contribution"] <= row["interval"][1]
        assert row["change"]["gained"] + row["change"]["lost"] == row["changed"] <= 4
    scores = [float(row.hit) for row in score_answers(asked[24:28]).rows]
    assert found["rows"][3]["without"] == pytest.approx(100 * sum(scores) / 4)


def test_what_a_bank_adds_has_an_interval_however_few_answers_changed() -> None:
    task = load_config(Path("configs/demo.yaml")).stream[0]
    with_all, without = np.ones(20), np.ones(20)
    for lost in (4, 5):
        without[:lost] = 0
        [row] = _dropped(["a", "b"], [(task, (0, 1)), (task, (0,))], [with_all, without], {task.name: independent(20)})
        assert (row.dropped, row.contribution, row.changed) == ("b", 5 * lost, lost)
        assert row.interval is not None and row.interval[0] < 5 * lost < row.interval[1]
        assert row.change is not None and row.change.mcnemar_p == 2 / 2**lost
        [cell] = [cell for cells in contribution_map([row]).rows.values() for cell in cells]
        assert (cell.ends, cell.changed) == (row.interval, row.change.text)
        assert cell.changed.startswith(f"{lost} of 20 changed (+{lost}, -0)")


def test_geometry_of_the_banks(analyzed: Path, trained_config: Path) -> None:
    found = json.loads((analyzed / "analysis.json").read_text())
    config = load_config(trained_config)
    banks = [load_bank(config.run_dir / "banks" / task) for task in TASKS]
    assert found["similarity"]["banks"] == TASKS
    assert list(found["similarity"]["by_layer"]) == ["0", "1", "2"]
    assert len(found["similarity"]["by_module"]) == 7
    cosines = []
    for layer in range(3):
        a, b = banks[0].matrices[f"model.language_model.layers.{layer}.mlp.up_proj"]
        c, d = banks[2].matrices[f"model.language_model.layers.{layer}.mlp.up_proj"]
        cosines.append(torch.cosine_similarity((b @ a).flatten(), (d @ c).flatten(), dim=0).item())
    assert found["similarity"]["by_module"]["up_proj"][0][2] == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert list(found["effective_rank"]) == ["tiny", "bare"]
    ranks = found["effective_rank"]["tiny"]
    assert all(1 < ranks[task]["mean"] < ranks[task]["rank"] == 4 for task in TASKS)
    assert ranks["PCAM"]["mean"] != found["effective_rank"]["bare"]["PCAM"]["mean"]


def test_the_report_shows_analysis_and_routing(analyzed: Path) -> None:
    page = Page(analyzed / "report.html")
    text = (analyzed / "report.md").read_text()
    for words in ("Task-agnostic answers", "Inside the banks", "Effective rank", "What each bank adds"):
        assert words in page.text and words in text
    assert "own stage, banks 1 last stage, banks 1 8 none: the same banks answer" in page.text
    assert page.loads == []
    routing = json.loads((analyzed / "routed" / "routing.json").read_text())["stages"][-1]
    assert f"Routing accuracy {routing['accuracy']:.1f} %" in page.text
    assert f"{sum(QUESTIONS.values())} questions of the 3 tasks learned by stage 3" in page.text
    assert "| pathvqa · PCAM |" in text and "| overall |" in text


def test_changed_answers_are_counted_by_kind(tmp_path: Path) -> None:
    tasks = ("pathvqa", "PCAM")
    _, results = make_run(tmp_path, "seq", "sequential", tasks, right=lambda task, stage: 18 if stage == 1 else 12)
    evaluation = read_evaluation(results)
    assert evaluation is not None
    at_training, last = evaluation.own_cell("pathvqa"), evaluation.last_cell("pathvqa")
    assert at_training is not None and last is not None
    found = _change(
        "pathvqa", "own stage", "last stage", (results, evaluation, at_training), (results, evaluation, last)
    )
    assert (found.changed, found.lost, found.gained, found.same_banks) == (12, 12, 0, False)
    assert [example.kind for example in found.examples] == ["lost"] * module.EXAMPLES
    back = _change("pathvqa", "last", "own", (results, evaluation, last), (results, evaluation, at_training))
    assert (back.lost, back.gained) == (0, 12)


def test_a_run_without_banks_is_refused(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(trained_config), f"output_dir={tmp_path}"]) == 1
    assert "no task of this run is trained yet" in capsys.readouterr().err
