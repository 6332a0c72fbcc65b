"""The release gate: verdicts from known answers, the chain of records, and the commands."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.data.records import TestRecords
from mslora_cr.evaluation.probabilities import PROBABILITIES, AnswerProbability, write_rows
from mslora_cr.evaluation.results import ReportError
from mslora_cr.evaluation.schemas import ROUTING, Routing, StageRouting
from mslora_cr.release.gate import gate_tests, verdict_of
from mslora_cr.release.plan import read_plan
from mslora_cr.release.records import records_of
from mslora_cr.routing.lda import load_statistics
from tests.conftest import once
from tests.helpers.report_run import make_run

TASKS = ("pathvqa", "slake-vqarad", "PCAM")


def plan_file(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def verdict(tmp_path: Path, plan: str, right: Any, tasks: tuple[str, ...] = TASKS) -> tuple[str, dict[str, Any]]:
    make_run(tmp_path, "run", method="sequential", tasks=tasks, right=right)
    results = tmp_path / "results" / "run"
    tests = gate_tests(read_plan(plan_file(tmp_path, plan), tasks), results, 0.05, lambda task: TestRecords(Path()))
    return verdict_of(tests), {test.name: test for test in tests}


def test_nothing_lost_is_released(tmp_path: Path) -> None:
    decision, tests = verdict(tmp_path, "{margin: 10, least_patients: 20}", lambda task, stage: 15)
    assert decision == "release"
    assert {name: (test.gained, test.lost, test.groups) for name, test in tests.items()} == {
        "pathvqa": (0, 0, 40),
        "slake-vqarad": (0, 0, 40),
    }


def test_a_loss_beyond_the_margin_is_rejected_whatever_the_others_do(tmp_path: Path) -> None:
    decision, tests = verdict(
        tmp_path,
        "{margin: 10, least_patients: 20}",
        lambda task, stage: 18 - (8 if task == "pathvqa" and stage > 1 else 0),
    )
    assert decision == "reject"
    assert (tests["pathvqa"].outcome, tests["pathvqa"].lost, tests["pathvqa"].needed) == ("fail", 16, None)
    assert tests["slake-vqarad"].outcome == "pass"


def test_small_losses_are_held_against_the_stage_that_learned_the_task(tmp_path: Path) -> None:
    """One more answer is lost at every stage: against the predecessor each step looks smaller than the whole."""
    _, tests = verdict(tmp_path, "{margin: 12, least_patients: 20}", lambda task, stage: 18 - stage)
    assert tests["pathvqa"].difference == pytest.approx(-10.0)  # two of twenty of either kind since stage 1
    assert tests["pathvqa"].outcome == "hold" and tests["pathvqa"].needed > 40
    assert "more would tell" in tests["pathvqa"].reason


def test_too_few_patients_are_held(tmp_path: Path) -> None:
    decision, tests = verdict(tmp_path, "{margin: 50, least_patients: 41}", lambda task, stage: 15)
    assert decision == "hold"
    assert "the plan asks for 41" in tests["pathvqa"].reason


def test_the_new_task_must_reach_its_score(tmp_path: Path) -> None:
    plan = "{margin: 20, least_patients: 15, new_task: {least_score: %d}}"
    low, tests = verdict(tmp_path / "a", plan % 40, lambda task, stage: 15)
    assert low == "release" and tests["PCAM"].score == pytest.approx(75)
    assert verdict(tmp_path / "b", plan % 70, lambda task, stage: 15)[0] == "hold"
    assert verdict(tmp_path / "c", plan % 80, lambda task, stage: 15)[0] == "reject"


def _asked(tmp_path: Path) -> Path:
    """A run whose first task loses 8 answers of either kind after its stage, all about women, with its test file."""
    lost = {("pathvqa", 1): 18}
    make_run(tmp_path, "run", "sequential", TASKS[:2], right=lambda task, stage: lost.get((task, stage), 10))
    lines = [
        {
            "question_id": number,
            "image": f"{number}.png",
            "text": "Is it?",
            "gt": "yes" if number >= 20 else "Mild cardiomegaly, no effusion.",
            "answer_type": "CLOSED" if number >= 20 else "OPEN",
            "attributes": {"sex": "F" if number % 20 >= 10 else "M", "site": "A" if number else "B"},
        }
        for number in range(40)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = tmp_path / "results" / "run"
    evaluation = (results / "evaluation.json").read_text().replace("ef" * 32, TestRecords(path).digest)
    (results / "evaluation.json").write_text(evaluation)
    return results


def test_groups_of_patients_are_judged_apart(tmp_path: Path) -> None:
    results = _asked(tmp_path)
    plan = "{margin: 60, least_patients: 20, subgroups: {sex: {margin: 50, level: 0.02}, site: {margin: 75}}}"

    def judged(text: str) -> dict[str, Any]:
        plan = read_plan(plan_file(tmp_path, text), TASKS)
        tests = gate_tests(plan, results, 0.05, lambda task: TestRecords(tmp_path / "test.jsonl"))
        return {test.name: test for test in tests}

    tests = judged(plan)
    assert tests["pathvqa"].outcome == "pass" and tests["pathvqa"].difference == -40
    women, men = tests["pathvqa, sex F"], tests["pathvqa, sex M"]
    assert (women.outcome, women.difference, women.groups, women.level) == ("fail", -80, 20, 0.02)
    assert (men.outcome, men.difference, men.lost) == ("pass", 0, 0)
    assert tests["pathvqa, site B"].outcome == "counted", "a single patient is not judged"
    assert verdict_of(list(tests.values())) == "reject"
    with pytest.raises(ReportError, match="no test record of an earlier task has the attribute age"):
        judged("{margin: 60, subgroups: {age: {margin: 1}}}")
    with pytest.raises(ReportError, match="pathvqa has no 'rouge-x' at stage 1"):
        judged("{margin: 60, tasks: {pathvqa: {metric: rouge-x}}}")


def test_calibration_and_foreign_questions_have_limits(tmp_path: Path) -> None:
    results = _asked(tmp_path)
    known = AnswerProbability(candidates=("yes", "no"), logprobs=(math.log(0.6), math.log(0.4)), lengths=(1, 1))
    for folder in (results / "pathvqa" / "stage-2", results / "slake-vqarad"):
        answers = (folder / "answer-file.jsonl").read_text().splitlines()
        rows = [known if json.loads(line)["answer_type"] == "CLOSED" else AnswerProbability() for line in answers]
        write_rows(folder / PROBABILITIES, (row.row(number) for number, row in enumerate(rows)))
    shutil.copytree(results, results / "routed")
    counts, foreign = {"pathvqa": (40, 0), "slake-vqarad": (0, 40)}, {"pathvqa": 0, "slake-vqarad": 30}
    stage = StageRouting(
        stage=2, learned=TASKS[:2], confusion=counts, questions=80, accuracy=100.0, interval=None, foreign=foreign
    )
    Routing(stages=(stage,)).write(results / "routed" / ROUTING)
    plan = "{margin: 90, least_patients: 20, calibration: {greatest_error: %d}, foreign: {greatest_share: 20}}"

    def judged(limit: int) -> dict[tuple[str, str], Any]:
        made = read_plan(plan_file(tmp_path, plan % limit), TASKS[:2])
        tests = gate_tests(made, results, 0.05, lambda task: TestRecords(tmp_path / "test.jsonl"))
        return {(test.what, test.name): test for test in tests}

    tests = judged(60)
    calibration = tests["calibration", "pathvqa"]  # the likeliest candidate, yes, has 0.6 and is always right
    assert calibration.score == pytest.approx(40) and calibration.outcome == "pass" and calibration.questions == 20
    assert judged(30)["calibration", "pathvqa"].outcome == "fail"
    none, many = tests["foreign questions", "pathvqa"], tests["foreign questions", "slake-vqarad"]
    assert none.bound == pytest.approx(20 - 100 * (1 - 0.05 ** (1 / 40))) and none.outcome == "pass"
    assert many.outcome == "fail" and many.score == 75
    (results / "routed" / ROUTING).unlink()
    with pytest.raises(ReportError, match="--banks-by routed"):
        judged(60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{margin: 5, level: 0.02, tasks: {PCAM: {level: 0.03}}}", "tasks.PCAM.level: 0.03 is above the plan's"),
        ("{margin: 5, subgroups: {sex: {}}}", "margin"),
        ("{margin: 0}", "margin"),
        ("{margin: 5, level: 0.7}", "level"),
        ("{margin: 5, tasks: {derm: {margin: 2}}}", "the run has no derm"),
        ("{margin: 5, marginal: 1}", "marginal"),
        ("[1, 2]", "plan.yaml"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan(plan_file(tmp_path, text), TASKS)


@pytest.fixture
def run(trained_config: Path, shared_tmp: Path, tmp_path: Path) -> Path:
    """The configuration of a copy of the tiny run, evaluated at all seen stages."""

    def build(folder: Path) -> None:
        shutil.copytree(trained_config.parent, folder)
        assert main(["evaluate", str(_moved(folder)), "--stages", "seen"]) == 0

    made = once(shared_tmp / "released", build)
    shutil.copytree(made, tmp_path / "copy")
    return _moved(tmp_path / "copy")


def _moved(folder: Path) -> Path:
    """The configuration of a run's folder, with its places there."""
    import yaml

    path = folder / "run.yaml"
    settings = yaml.safe_load(path.read_text())
    settings |= {"output_dir": str(folder / "checkpoints"), "results_dir": str(folder / "results")}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def _registered_before(config: Path, plan: Path) -> None:
    """Register a plan as if the last task had not been trained yet."""
    assert main(["release", "register", str(plan), str(config)]) == 0
    file = max((load_config(config).run_dir / "releases" / "plans").glob("*.json"), key=lambda one: one.stat().st_mtime)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"finished": list(TASKS[:2])}))


def test_the_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_file(tmp_path, "{margin: 75, least_patients: 2, note: first}")
    assert main(["release", str(plan), str(run)]) == 1  # not registered
    _registered_before(run, plan)
    assert main(["release", str(plan), str(run)]) == 0
    assert main(["release", str(plan), str(run)]) == 0  # the same candidate keeps its record
    assert "RELEASE" in capsys.readouterr().out
    folder = load_config(run).run_dir / "releases"
    assert len(records_of(folder.parent)) == 1
    text = (folder / "0001.md").read_text()
    assert all(part in text for part in ("Description of modifications", "Modification protocol", "Impact assessment"))
    assert "**[Write]**" in text and "note: first" in text

    strict = plan_file(tmp_path, "{margin: 0.1, least_patients: 2, new_task: {least_score: 100}}")
    assert main(["release", "register", str(strict), str(run)]) == 0
    assert main(["release", str(strict), str(run)]) in (3, 4)
    [first, second] = records_of(folder.parent)
    assert (first.candidate, second.candidate, second.serves) == (1, 2, 1)
    assert second.level == pytest.approx(first.level / 4)
    assert any("after PCAM was trained" in reason for reason in second.reasons)
    for words in (["list", str(run)], ["show", str(run), "1"], ["verify", str(run)]):
        assert main(["release", *words]) == 0
    assert "live" in capsys.readouterr().out
    assert main(["release", "rollback", str(run), "2"]) == 1  # never released
    assert main(["release", "rollback", str(run), "1"]) == 1  # live already
    image = next((Path(load_config(run).data.root)).rglob("*.png"))
    ask = ["ask", str(run), "--task", "PCAM", "--image", str(image), "Is it?"]
    assert main([*ask, "--release", "1"]) == 0
    assert main([*ask, "--release", "2"]) == 1
    assert main([*ask, "--release", "1", "--stage", "1"]) == 1
    assert main([*ask, "--release", "1", "--task", "HAM"]) == 1
    assert main(["export", str(run), "--output", str(tmp_path), "--format", "peft", "--release", "1"]) == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/adapter_config.json")) == sorted(TASKS)

    second_plan = plan_file(tmp_path, "{margin: 95, least_patients: 2}")
    _registered_before(run, second_plan)
    assert main(["release", str(second_plan), str(run)]) == 0
    assert [record.serves for record in records_of(folder.parent)] == [1, 1, 3]
    assert main(["release", "rollback", str(run), "1"]) == 0
    assert main(["release", "verify", str(run)]) == 0
    assert [(record.kind, record.serves) for record in records_of(folder.parent)][2:] == [("gate", 3), ("rollback", 1)]
    capsys.readouterr()
    assert main(["release", "list", str(run)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "live" in line] == [["1", "live"]]


def test_statistics_of_two_sites_make_one_router(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(run)
    site = tmp_path / "site"
    shutil.copytree(config.run_dir, site)
    bank = config.run_dir / "banks" / "PCAM"
    before = load_statistics(bank)
    assert main(["bank", "combine-router", str(run), "PCAM", "--from", str(site), str(site / "banks" / "PCAM")]) == 0
    after = load_statistics(bank)
    assert after.count == 2 * before.count
    assert torch.allclose(after.mean, before.mean) and torch.allclose(after.scatter, 2 * before.scatter, atol=1e-6)
    (site / "banks" / "PCAM" / "router.safetensors").unlink()
    assert main(["bank", "combine-router", str(run), "PCAM", "--from", str(site), str(site)]) == 1
    assert "no usable router statistics" in capsys.readouterr().err


def test_a_broken_chain_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_file(tmp_path, "{margin: 75, least_patients: 2}")
    _registered_before(run, plan)
    assert main(["release", str(plan), str(run)]) == 0
    config = load_config(run)
    path = config.run_dir / "releases" / "0001.json"
    whole = path.read_text()
    path.write_text(whole.replace('"verdict": "release"', '"verdict": "hold"'))
    assert main(["release", "verify", str(run)]) == 1
    assert "0001.json was changed" in capsys.readouterr().err
    path.write_text(whole)
    assert main(["release", "verify", str(run)]) == 0
    bank = config.run_dir / "banks" / "PCAM" / "adapter_model.safetensors"
    bank.write_bytes(bank.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert main(["release", "verify", str(run)]) == 1
    assert "is not the bank of release 1" in capsys.readouterr().err
