"""Task-agnostic answers, through the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.banks.io import load_bank
from mslora_cr.banks.per_sample import PerSampleAdapters
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.generation.prefix_decoder import Decoder
from mslora_cr.models.load import load_base
from mslora_cr.routing import features as router
from mslora_cr.routing import lda
from mslora_cr.runs.ledger import Ledger
from tests.evaluation.test_evaluate import QUESTIONS, TASKS, Results
from tests.helpers.killing import KillPoint, run_until_killed

ANSWER = "mslora_cr.generation.prefix_decoder:Decoder.answer"


@pytest.fixture
def results(trained_config: Path, tmp_path: Path) -> Results:
    return Results(trained_config, tmp_path / "results")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The banks that each row of each batch is answered with."""
    seen: list[list[list[int]]] = []
    answer = Decoder.answer

    def noted(decoder: Any, openings: Any, questions: Any, waiting: int = 1) -> Any:
        if decoder.mixed is not None:
            seen.append([list(decoder.mixed.of(question)) for question in questions])
        return answer(decoder, openings, questions, waiting)

    monkeypatch.setattr(Decoder, "answer", noted)
    return seen


def tell(monkeypatch: pytest.MonkeyPatch, route: Any) -> None:
    """Let the router say what a function of the task's number says."""
    real = router.FeatureExtractor.batches

    def marked(self: Any, records: Any, *args: Any) -> Any:
        number = [folder in str(records.path) for folder in ("PathVQA", "Slake-VQARad", "PCam")].index(True)
        for batch in real(self, records, *args):
            batch[:, 0] = number
            yield batch

    monkeypatch.setattr(router.FeatureExtractor, "batches", marked)
    monkeypatch.setattr(
        lda.Router, "route", lambda self, features: torch.tensor([route(int(n)) for n in features[:, 0]])
    )


def texts(folder: Path, name: str = "answer-file.jsonl") -> list[str]:
    return [json.loads(line)["text"] for line in (folder / name).read_text().splitlines()]


def routed(results: Results, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert main(results.command("--banks-by", "routed", *arguments)) == 0
    folder = results.run / "routed"
    return json.loads((folder / "evaluation.json").read_text()), json.loads((folder / "routing.json").read_text())


def test_rightly_routed_questions_are_answered_as_task_aware_ones(
    results: Results, batches: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, lambda number: number)
    summary, routing = routed(results, "evaluation.max_new_tokens=8", "evaluation.batch_size=20")
    # One batch answers the questions of the tasks that ask several about an image, each with its task's banks; the
    # third asks one.
    shared, alone = batches
    assert sorted(shared) == [[1, 0, 0]] * 8 + [[1, 1, 0]] * 8
    assert alone == [[1, 1, 1]] * 4
    assert routing["stages"][0]["accuracy"] == 100
    results.evaluate("evaluation.max_new_tokens=8")
    answers = [texts(results.run / task) for task in TASKS]
    assert [texts(results.run / "routed" / task / "stage-3") for task in TASKS] == answers
    assert len({text for task in answers for text in task}) > 5  # not one answer for all
    assert [cell["banks"] for cell in summary["cells"]] == [TASKS] * 3
    assert summary["banks_by"] == "routed"


def test_wrongly_routed_questions_are_answered_by_the_wrong_banks(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, lambda number: 0)
    _, routing = routed(results, "evaluation.max_new_tokens=8")
    [stage] = routing["stages"]
    assert stage["confusion"] == {task: [QUESTIONS[task], 0, 0] for task in TASKS}
    assert stage["accuracy"] == pytest.approx(100 * 8 / 20)
    assert stage["interval"][0] < 40 < stage["interval"][1]
    results.evaluate("--stages", "all", "evaluation.max_new_tokens=8")
    for task in TASKS:  # with bank 1 alone, as at stage 1
        folder = results.run / task / ("" if task == "pathvqa" else "stage-1")
        assert texts(results.run / "routed" / task / "stage-3") == texts(folder)
    lines = (results.run / "routed" / "PCAM" / "stage-3" / "answer-file.jsonl").read_text().splitlines()
    assert {json.loads(line)["metadata"]["routed_to"] for line in lines} == {"pathvqa"}


def test_the_router_itself_knows_the_tasks(results: Results) -> None:
    """Words and pictures of the three tasks differ, even to a tower of random weights."""
    _, routing = routed(results, "--stages", "seen")
    assert [stage["stage"] for stage in routing["stages"]] == [1, 2, 3]
    assert [stage["learned"] for stage in routing["stages"]] == [TASKS[:1], TASKS[:2], TASKS]
    assert routing["stages"][-1]["questions"] == 20
    assert all(stage["accuracy"] >= 90 for stage in routing["stages"])


def test_statistics_stand_with_the_banks_and_in_the_ledger(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(results.config)
    shutil.copytree(config.run_dir, tmp_path / "copy" / "tiny")
    place = f"output_dir={tmp_path / 'copy'}"
    folder = tmp_path / "copy" / "tiny" / "banks" / "PCAM"
    entry = json.loads((tmp_path / "copy" / "tiny" / "ledger.json").read_text())["tasks"]["PCAM"]
    before = (folder / "router.safetensors").read_bytes()
    assert len(entry["router_digest"]) == 64
    (folder / "router.safetensors").write_bytes((folder.with_name("pathvqa") / "router.safetensors").read_bytes())
    assert main(results.command("--banks-by", "routed", place)) == 1
    assert "PCAM/router.safetensors is not what the ledger records" in capsys.readouterr().err
    (folder / "router.safetensors").unlink()
    assert main(results.command("--banks-by", "routed", place)) == 1
    assert "mslora-cr bank fit-router" in capsys.readouterr().err
    assert main(["bank", "fit-router", str(results.config), "--task", "PCAM", place]) == 0
    assert (folder / "router.safetensors").read_bytes() == before
    assert main(results.command("--banks-by", "routed", place)) == 0


def test_a_killed_routed_evaluation_goes_on(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Results(results.config, tmp_path / "whole")
    routed(whole)
    command = results.command("--banks-by", "routed")
    run_until_killed(command, KillPoint(ANSWER, call=3), tmp_path / "output")
    asked: list[int] = []
    answer = Decoder.answer

    def counted(decoder: Any, openings: Any, questions: Any, waiting: int = 1) -> Any:
        asked.append(len(questions))
        return answer(decoder, openings, questions, waiting)

    monkeypatch.setattr(Decoder, "answer", counted)
    routed(results)
    assert sum(asked) == 20 - 2 * 4
    assert results.answers() == whole.answers()
    routed(results)
    assert sum(asked) == 20 - 2 * 4  # nothing is asked again
    assert not list(results.run.rglob(".answers-*"))


def test_stages_of_several_calls_stand_together(results: Results, batches: list[list[list[int]]]) -> None:
    routed(results)
    routed(results, "--stages", "seen")
    assert sum(map(len, batches)) == (8 + 8 + 4) + (8 + 8) + 8  # the last stage is not answered again
    summary, routing = routed(results)
    assert [stage["stage"] for stage in routing["stages"]] == [1, 2, 3]
    assert {(cell["task"], cell["stage"]) for cell in summary["cells"]} == {
        (task, stage) for number, task in enumerate(TASKS, 1) for stage in range(number, 4)
    }


def test_stages_answered_with_other_settings_are_left_out(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    routed(results, "--stages", "seen")
    capsys.readouterr()
    summary, routing = routed(results, "evaluation.max_new_tokens=3")
    assert [stage["stage"] for stage in routing["stages"]] == [3]
    assert [(cell["task"], cell["stage"]) for cell in summary["cells"]] == [(task, 3) for task in TASKS]
    assert "gave the answers: pathvqa at stage 1, 2; slake-vqarad at stage 2\n" in capsys.readouterr().err


def test_a_stage_that_a_kill_left_without_its_routing_is_left_out(results: Results) -> None:
    """Its joint stamp goes first where it is answered anew; the tasks' own are still the old ones then."""
    routed(results, "--stages", "seen")
    (results.run / "routed" / "stage-1" / "answers.json").unlink()
    summary, routing = routed(results)
    assert [stage["stage"] for stage in routing["stages"]] == [2, 3]
    assert {cell["stage"] for cell in summary["cells"]} == {2, 3}
    _, routing = routed(results, "--stages", "seen")
    assert [stage["stage"] for stage in routing["stages"]] == [1, 2, 3]


def test_stages_whose_questions_were_mixed_with_those_of_all_tasks_stay(results: Results) -> None:
    routed(results, "--stages", "all")
    summary, routing = routed(results)
    assert [stage["stage"] for stage in routing["stages"]] == [1, 2, 3]
    assert len(summary["cells"]) == 9


def test_what_tells_the_task_is_refused(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--task", "PCAM"), "--task cannot be combined with routed evaluation"),
        (("--stages", "own"), "answered together"),
    ):
        assert main(results.command("--banks-by", "routed", *arguments)) == 1
        assert message in capsys.readouterr().err


def test_a_method_with_one_bank_for_all_is_refused(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(results.command("--banks-by", "routed", "method=sequential")) == 1
    assert "answers every task with the same banks" in capsys.readouterr().err


def test_mixed_rows_get_what_merged_banks_give(results: Results) -> None:
    """Logits of rows with different banks, and with shares of them, against the model with those merged in."""
    config = load_config(results.config)
    ledger = Ledger.read(config)
    banks = [load_bank(ledger.bank_folder(task)) for task in TASKS]
    for bank in banks:  # trained for four steps, they hardly move a logit
        for _, b in bank.matrices.values():
            b.mul_(30)
    base = load_base(config, "cpu").model
    ids = torch.randint(4, 900, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 1], [0.7, 0.1, 0.2]])
    stack = BankStack(base, "merge", reuse=True)
    expected = []
    with torch.inference_mode():
        for row, weights in zip(ids, rows.tolist(), strict=True):
            stack.set_frozen([replace(bank, alpha=bank.alpha * w) for bank, w in zip(banks, weights, strict=True)])
            expected.append(base(input_ids=row[None]).logits[0])
        stack.set_frozen([])
        mixed = PerSampleAdapters(base, banks)
        mixed.set_rows(rows)
        found = base(input_ids=ids).logits
        assert (found - torch.stack(expected)).abs().max() < 1e-4
        assert (found[0] - found[1]).abs().max() > 1 and (found[2] - found[3]).abs().max() > 0.1
        mixed.remove()
        assert torch.equal(base(input_ids=ids[1:2]).logits[0], expected[1])
