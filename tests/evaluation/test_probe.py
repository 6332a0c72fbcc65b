"""`mslora-cr evaluate --probe`: what a stream does to a data set that none of its tasks trains."""

import json
from pathlib import Path

import numpy as np
import pytest

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.evaluation.probe import _cells, _losses, check_held_out, evaluate_probe
from mslora_cr.evaluation.probe_result import MEASURED, Probe, probe_table
from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.score import read_scores, score_file
from mslora_cr.release.gate import _probe
from mslora_cr.release.plan import Plan
from mslora_cr.reporting.report import write_report
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.statistics.paired import paired_change, paired_task


def test_a_held_out_data_set_is_answered_at_every_stage_and_set_against_the_base(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(trained_config), f"results_dir={tmp_path}", "--stages", "final", "--probe", "derm"]
    assert main(command) == 0
    output = capsys.readouterr().out
    results = tmp_path / "tiny"
    path = results / "probe" / "derm" / "probe.json"
    found = Probe.read(path)
    assert [(cell.stage, cell.banks) for cell in found.cells] == [
        (0, ()),
        (1, ("pathvqa",)),
        (2, ("pathvqa", "slake-vqarad")),
        (3, ("pathvqa", "slake-vqarad", "PCAM")),
    ]
    assert f"derm, a held-out data set, {found.cells[0].rows} questions" in output
    tables = {cell.stage: read_scores((results / cell.answers).with_name("scores.csv")) for cell in found.cells}
    for loss in found.losses:
        before, after = tables[0].columns[loss.metric], tables[loss.stage].columns[loss.metric]
        known = ~np.isnan(before)
        lost = (before - after)[known]
        assert loss.loss == pytest.approx(100 * lost.mean()) == loss.base - loss.score
        if loss.metric == "exact match score":
            wanted = paired_change([paired_task(lost, tables[0].groups[known], binary=True)])
            assert loss.interval == pytest.approx(wanted.ends)
            assert loss.change.mcnemar_p == wanted.p
            assert (loss.changed, loss.questions) == (np.count_nonzero(lost), len(lost))
    assert {(loss.stage, loss.metric) for loss in found.losses} == {
        (stage, name) for stage in (1, 2, 3) for name in MEASURED
    }
    assert {loss.stage for loss in found.last()} == {3}
    last = next(loss for loss in found.last() if loss.metric == "exact match score")
    judged = _probe(Plan(margin=5, least_patients=2, probes={"derm": 90}), results, "derm", 0.05)
    assert (judged.reference, judged.score) == (pytest.approx(last.base), pytest.approx(last.score))

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
        assert "derm" in text and "a held-out data set" in text


def test_a_loss_is_what_the_base_has_more_and_so_is_its_interval(tmp_path: Path) -> None:
    """Of 20 closed questions the base has 18 right, the first stage 8 of these, the second 16."""
    cells = []
    for stage, right in ((0, 18), (1, 8), (2, 16)):
        rows = [{"question_id": n, "prompt": "?", "text": "yes" if n < right else "no", "gt": "yes"} for n in range(20)]
        answers = tmp_path / f"stage-{stage}" / "answer-file.jsonl"
        answers.parent.mkdir()
        answers.write_text("".join(json.dumps({**row, "answer_type": "CLOSED"}) + "\n" for row in rows))
        scores = score_file(answers, answers.parent)
        known = {"questions": "", "rows": 20, "fingerprint": "", "seconds": 1.0, "intervals": {}}
        place = str(answers.relative_to(tmp_path))
        cells.append(Cell(task="held", stage=stage, banks=(), answers=place, metrics=scores.metrics, **known))
    found = {loss.metric: loss for loss in _losses(tmp_path, tuple(cells[:2]))}
    loss = found["close accuracy"]
    assert (loss.base, loss.score, loss.loss) == (90, 40, 50)
    assert 20 < loss.interval[0] < 50 < loss.interval[1] < 75 and loss.interval == found["exact match score"].interval
    few = _losses(tmp_path, (cells[0], cells[2]))
    assert {(loss.loss, loss.changed, loss.questions) for loss in few} == {(10, 2, 20)}
    assert all(loss.interval[0] < 0 < 10 < loss.interval[1] for loss in few)
    probe = Probe(
        run="a", method="each", banks_by="prefix", dataset="held", cells=(cells[0],), losses=tuple(few), environment={}
    )
    assert "2 of 20 changed (+2, -0), at most 13.9 % lost, McNemar p 0.500" in probe_table(probe)
    same = cells[1].model_copy(update={"answers": cells[0].answers, "metrics": cells[0].metrics})
    assert {loss.interval for loss in _losses(tmp_path, (cells[0], same))} == {(0.0, 0.0)}  # the same answers


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
