"""`mslora-cr evaluate --endpoint`: a served model asked over the wire, by a stand-in server with faults."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import StreamConfig
from mslora_cr.evaluation.endpoint import evaluate_endpoint
from mslora_cr.evaluation.openai_client import Endpoint, EndpointError
from tests.helpers.chat_server import FAULTS, Server, serving
from tests.helpers.report_run import Page


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def config(tmp_path: Path, trained_config: Path) -> StreamConfig:
    return load_config(trained_config, [f"results_dir={tmp_path / 'results'}"])


def endpoint(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "llava", "timeout": 1.5, "pause": 0.01, "concurrency": 4, **changes})


def test_it_is_asked_through_faults_and_scored_as_any_other(
    server: Server, config: StreamConfig, trained_config: Path, tmp_path: Path
) -> None:
    server.faults = list(FAULTS)
    path = evaluate_endpoint(config, endpoint(server, model="llava/{task}"))
    summary = json.loads(path.read_text())
    assert path.parent.parent == tmp_path / "results" / "tiny" / "served" and summary["method"] == "served"
    assert [(cell["task"], cell["stage"], cell["banks"]) for cell in summary["cells"]] == [
        (task, 3, [f"llava/{task}"]) for task in ("pathvqa", "slake-vqarad", "PCAM")
    ]
    for cell in summary["cells"]:
        rows = [json.loads(line) for line in (path.parent / cell["answers"]).read_text().splitlines()]
        assert {row["text"] for row in rows} == {"Yes"} and len(rows) == cell["rows"]
        assert cell["metrics"] == json.loads((path.parent / cell["task"] / "metrics.json").read_text())["metrics"]
    # Every fault was met, each question answered once, several at a time.
    assert set(server.asked.values()) == {2} and set(server.answered.values()) == {1} and server.most_busy > 1
    mslora_cr.evaluate(config, "final")
    page = tmp_path / "page.html"
    assert main(["compare", str(config.results_run_dir), str(path.parent), "--page", str(page)]) == 0
    html = Page(page)
    assert "tiny and llava-task" in html.text and "served" in html.text and "mslora_cr" in html.text
    for cell in summary["cells"]:
        assert f"{cell['metrics']['close accuracy']:.1f}" in html.text
    asked = len(server.bodies)
    assert evaluate_endpoint(config, endpoint(server, model="llava/{task}"), "PCAM") == path
    assert len(server.bodies) == asked and len(json.loads(path.read_text())["cells"]) == 3


def test_what_is_asked_is_the_picture_and_the_question(
    server: Server, config: StreamConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    evaluate_endpoint(config, endpoint(server), "PCAM")
    folder = Path(config.data.root) / "PCam"
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    wanted = {(row["text"], Image.open(folder / row["image"]).convert("RGB").tobytes()) for row in rows}
    found = set()
    for body in server.bodies:
        image, text = body["messages"][0]["content"]
        kind, _, data = image["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        found.add((text["text"], Image.open(io.BytesIO(base64.b64decode(data))).tobytes()))
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("llava", 0, 4)
    assert found == wanted and server.keys == {"Bearer sesame"}


def test_a_server_that_is_gone_ends_it_and_nothing_is_asked_twice(server: Server, config: StreamConfig) -> None:
    server.left = 3
    with pytest.raises(
        EndpointError, match=r"no answer from llava in 3 attempts .* 3 of 8 answers to pathvqa are stored"
    ):
        evaluate_endpoint(config, endpoint(server, attempts=3))
    server.left = 10**9
    evaluate_endpoint(config, endpoint(server))
    assert sum(server.answered.values()) == 20 and set(server.answered.values()) == {1}


def test_a_refusal_ends_it_at_once_and_names_the_question(server: Server, config: StreamConfig) -> None:
    server.refusal = b'{"error": "no model llava"}'
    with pytest.raises(
        EndpointError, match=r"refuses the question on line \d+ of .*test.jsonl \(HTTP 404: .*no model llava"
    ):
        evaluate_endpoint(config, endpoint(server))


def test_the_command(server: Server, trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(trained_config), f"results_dir={tmp_path}", "--endpoint", server.url]
    assert main([*command, "--model", "other lab's", "--task", "PCAM", "--concurrency", "2"]) == 0
    [folder] = (tmp_path / "tiny" / "served").iterdir()
    assert f"results: {folder}" in capsys.readouterr().out and folder.name.startswith("other-lab-s-")
    assert server.most_busy <= 2
    for arguments, message in (
        ([], "both --endpoint URL and --model NAME"),
        (["--model", "m", "--stages", "all"], "--endpoint cannot be combined with"),
        (["--model", "m", "--probe", "other"], "--stages or --probe"),
        (["--model", "m", "--endpoint", "ftp://x/v1"], "expected an address such as"),
        (["--model", "m", "--endpoint", "http://me:secret@x/v1"], "set OPENAI_API_KEY"),
    ):
        assert main([*command, *arguments]) == 1
        assert message in (output := capsys.readouterr().err) and "secret" not in output
    assert main(["evaluate", str(trained_config), "--concurrency", "2"]) == 1
    assert "--concurrency needs --endpoint or --judge" in capsys.readouterr().err
