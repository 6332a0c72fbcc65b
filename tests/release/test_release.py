"""The release gate: verdicts from known answers, the chain of records, and the commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
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
    tests = gate_tests(read_plan(plan_file(tmp_path, plan), tasks), tmp_path / "results" / "run", 0.05)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
    [file] = (load_config(config).run_dir / "releases" / "plans").glob("*.json")
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
