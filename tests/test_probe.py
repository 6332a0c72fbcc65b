"""`mslora-cr evaluate --probe`: what a stream does to a data set that none of its tasks trains."""

import json
from pathlib import Path

import numpy as np
import pytest

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.evaluation.intervals import difference_interval, estimate, percent
from mslora_cr.evaluation.probe import _cells, check_held_out, evaluate_probe
from mslora_cr.evaluation.probe_result import MEASURED, Probe
from mslora_cr.evaluation.score import read_scores
from mslora_cr.reporting.report import write_report
from mslora_cr.runs.ledger import finished_banks


def test_a_held_out_data_set_is_answered_at_every_stage_and_set_against_the_base(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(trained_config), f"results_dir={tmp_path}", "--stages", "final", "--probe", "derm"]
    assert main(command) == 0
    told = capsys.readouterr().out
    results = tmp_path / "tiny"
    path = results / "probe" / "derm" / "probe.json"
    found = Probe.read(path)
    assert [(cell.stage, cell.banks) for cell in found.cells] == [
        (0, ()),
        (1, ("pathvqa",)),
        (2, ("pathvqa", "slake-vqarad")),
        (3, ("pathvqa", "slake-vqarad", "PCAM")),
    ]
    assert f"derm, which no task trains, {found.cells[0].rows} questions" in told
    tables = {cell.stage: read_scores((results / cell.answers).with_name("scores.csv")) for cell in found.cells}
    for loss in found.losses:
        before, after = tables[0].columns[loss.metric], tables[loss.stage].columns[loss.metric]
        known = ~np.isnan(before)
        lost = (before - after)[known]
        assert loss.loss == pytest.approx(100 * lost.mean()) == loss.base - loss.score
        if loss.metric == "exact match score":
            wanted = percent(difference_interval(estimate(lost, tables[0].groups[known]), binary=True))
            assert loss.interval == pytest.approx(wanted)
    assert {(loss.stage, loss.metric) for loss in found.losses} == {
        (stage, name) for stage in (1, 2, 3) for name in MEASURED
    }
    assert {loss.stage for loss in found.last()} == {3}

    # The banks of a stage are those that a trained run answers with when its last task is named.
    answers = [json.loads(line) for line in (results / found.cells[-1].answers).read_text().splitlines()]
    model = mslora_cr.load(trained_config.parent / "checkpoints" / "tiny", task="PCAM")
    folder = Path(load_config(trained_config).data.root) / "Fitzpatrick"
    asked = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    image = next(folder.rglob(asked[0]["image"]))
    assert model.answer(image, asked[0]["text"]) == answers[0]["text"]

    config = load_config(trained_config, [f"results_dir={tmp_path}"])
    written = {cell.answers: (results / cell.answers).stat().st_mtime_ns for cell in found.cells}
    assert Probe.read(evaluate_probe(config, "derm")).losses == found.losses
    assert {name: (results / name).stat().st_mtime_ns for name in written} == written, "nothing is answered again"
    page = write_report(config.run_dir, results, config)
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert "derm" in text and "no task trains" in text


def test_which_banks_answer_what_is_of_no_task(trained_config: Path) -> None:
    for method, wanted in (("each", [(), (1,), (2,), (3,)]), ("sequential", [(), (1,), (2,), (3,)])):
        config = load_config(trained_config, [f"method={method}"])
        banks = dict(enumerate(finished_banks(load_config(trained_config)).values(), 1))
        cells = _cells(config, check_held_out(config, "HAM"), banks)
        assert [cell.banks for cell in cells] == wanted and len({cell.folder for cell in cells}) == 4


def test_what_cannot_be_held_out_is_refused(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(trained_config, [f"results_dir={tmp_path}"])
    for name, message in (("dermm", "unknown data set 'dermm'.*derm"), ("PCAM", "PCAM is a task of this stream")):
        with pytest.raises(ConfigError, match=message):
            evaluate_probe(config, name)
    routed = ["evaluate", str(trained_config), f"results_dir={tmp_path}", "--banks-by", "routed", "--probe", "derm"]
    assert main(routed) == 1 and "questions of no task cannot be routed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "it is refused before anything is answered"
