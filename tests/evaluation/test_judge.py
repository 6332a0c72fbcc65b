"""`mslora-cr evaluate --judge`: open answers judged by a served model, a stand-in server with faults."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import StreamConfig
from mslora_cr.evaluation.evaluate import evaluate
from mslora_cr.evaluation.judge import Judged, judge, read_verdicts, verdict_of
from mslora_cr.evaluation.openai_client import Endpoint, EndpointError
from mslora_cr.statistics.intervals import estimate, independent, percent, score_interval
from tests.conftest import once
from tests.helpers.chat_server import FAULTS, Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.reply = opinion
        yield server


@pytest.fixture(scope="module")
def evaluated(shared_tmp: Path, trained_config: Path) -> StreamConfig:
    """A run whose tasks are evaluated at every stage from their own on."""
    folder = once(
        shared_tmp / "judged", lambda folder: evaluate(load_config(trained_config, [f"results_dir={folder}"]), "seen")
    )
    return load_config(trained_config, [f"results_dir={folder}"])


@pytest.fixture
def results(evaluated: StreamConfig, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated.results_run_dir, tmp_path / "results"))


def opinion(body: dict[str, Any]) -> str:
    """By the reference alone, so that a test knows it: as long as 3n letters is correct, 3n + 1 partial, the rest wrong."""
    return ("Correct.", "PARTIAL", "wrong")[len(json.loads(body["messages"][1]["content"])["reference"]) % 3]


def endpoint(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "judge", "timeout": 1.5, "pause": 0.01, "concurrency": 4, **changes})


def opened(results: Path, file: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (results / file).read_text().splitlines()]
    return [row for row in rows if row["answer_type"] == "OPEN"]


def files(results: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "judged" not in path.parts}


def test_open_answers_are_judged_through_faults_and_apart_from_their_scores(server: Server, results: Path) -> None:
    server.faults, before = list(FAULTS), files(results)
    path = judge(results, endpoint(server))
    assert files(results) == before and path == results / "judged" / "judge" / "judged.json"
    found = Judged.read(path)
    evaluation = json.loads((results / "evaluation.json").read_text())
    wanted = [cell for cell in evaluation["cells"] if opened(results, cell["answers"])]
    assert wanted and [(cell.task, cell.stage) for cell in found.cells] == [(c["task"], c["stage"]) for c in wanted]
    worth = (1.0, 0.5, 0.0)
    for cell in found.cells:
        scores = np.array([worth[len(row["gt"]) % 3] for row in opened(results, cell.answers)])
        assert (cell.questions, cell.unclear) == (len(scores), 0)
        assert [cell.correct, cell.partial, cell.wrong] == [int((scores == value).sum()) for value in worth]
        assert cell.score == pytest.approx(100 * scores.mean())
        if len({row["prompt"] for row in opened(results, cell.answers)}) == len(scores):
            assert cell.interval == pytest.approx(percent(score_interval([estimate(scores, independent(len(scores)))])))
    # Each different answer is asked for once, whatever stages it stands at; every fault was met, several at a time.
    different = {(row["prompt"], row["gt"], row["text"]) for c in wanted for row in opened(results, c["answers"])}
    assert len(server.answered) == len(different) and set(server.answered.values()) == {1} and server.most_busy > 1
    assert len(read_verdicts(path.with_name("verdicts.jsonl"))) == len(different)


def test_verdicts_are_kept_by_what_was_judged_and_by_whom(
    server: Server, results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.left = 2
    with pytest.raises(EndpointError, match=r"no answer from judge in 2 attempts .* 2 of \d+ verdicts are stored"):
        judge(results, endpoint(server, attempts=2))
    cache = results / "judged" / "judge" / "verdicts.jsonl"
    first, second = cache.read_bytes().splitlines()
    # One is changed, and a kill cuts a third one short: both are asked again, and what is there stays as it is.
    changed = second.replace(b'"reply": "', b'"reply": "not ')
    cache.write_bytes(first + b"\n" + changed + b"\n" + second[:40])
    server.left = 10**9
    judge(results, endpoint(server))
    assert "2 verdicts are damaged" in caplog.text
    assert cache.read_bytes().startswith(first + b"\n" + changed + b"\n" + second[:40] + b"\n")
    known, asked = read_verdicts(cache), len(server.bodies)
    judge(results, endpoint(server))
    assert len(server.bodies) == asked, "nothing is asked twice"
    file = next(results.glob("pathvqa/answer-file.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    next(row for row in rows if row["answer_type"] == "OPEN")["text"] = "something else"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = json.loads((results / "evaluation.json").read_text())
    for cell in evaluation["cells"]:
        cell.pop("sha256")
    (results / "evaluation.json").write_text(json.dumps(evaluation))
    judge(results, endpoint(server))
    assert len(server.bodies) == asked + 1 and len(read_verdicts(cache)) == len(known) + 1
    judge(results, endpoint(server, model="another/judge"))
    assert len(server.bodies) > asked + 2 and len(list((results / "judged").iterdir())) == 2


def test_what_a_judge_is_told_and_what_counts_as_its_verdict(
    server: Server, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not for the judge")
    server.reply = lambda body: "I would say CORRECT"
    [*cells] = Judged.read(judge(results, endpoint(server, key="JUDGE_API_KEY"))).cells
    assert server.keys == {None}
    assert all(cell.unclear == cell.questions and cell.score is None and cell.interval is None for cell in cells)
    rows = {(r["prompt"], r["gt"], r["text"]) for cell in cells for r in opened(results, cell.answers)}
    questions = [json.loads(body["messages"][1]["content"]) for body in server.bodies]
    assert {(row["question"], row["reference"], row["answer"]) for row in questions} == rows
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("judge", 0)}
    assert [verdict_of(text) for text in ("CORRECT", "**Partial**\n", "wrong.", "", "CORRECT. Or WRONG?")] == [
        "correct",
        "partial",
        "wrong",
        None,
        None,
    ]


def test_the_command(
    server: Server, evaluated: StreamConfig, trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated.results_dir, tmp_path / "results")
    command = ["evaluate", str(trained_config), f"results_dir={tmp_path}/results", "--stages", "seen"]
    assert main([*command, "--judge", server.url, "--judge-model", "judge"]) == 0
    output = capsys.readouterr().out
    assert "judged by judge: a model's opinion" in output and "partial" in output
    for arguments, message in (
        (["--judge", server.url], "both --judge URL and --judge-model NAME"),
        (["--judge", "ftp://x/v1", "--judge-model", "m"], "--judge ftp://x/v1: expected an address such as"),
        (["--judge", "http://me:secret@x/v1", "--judge-model", "m"], "set JUDGE_API_KEY"),
    ):
        assert main([*command, *arguments]) == 1
        assert message in (said := capsys.readouterr().err) and "secret" not in said
