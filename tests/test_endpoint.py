"""`mslora-cr evaluate --endpoint`: a served model asked over the wire, by a stand-in server with faults."""

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import StreamConfig
from mslora_cr.evaluation.endpoint import Endpoint, EndpointError, evaluate_endpoint

FAULTS = ("500", "hang", "cut", "nonsense", "429", "drop")


class Server(ThreadingHTTPServer):
    """Answers `answers[question]`, or "yes". The first request of every question meets the next of `faults`; when
    `left` questions are answered, it refuses everything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[str] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.left = 10**9
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body["messages"])
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization"))
            server.asked[key] += 1
            first = server.asked[key] == 1
            fault = server.faults[len(server.asked) % len(server.faults)] if server.faults and first else ""
            gone = server.left <= 0
            if not fault and not gone:
                server.left -= 1
            server.busy += 1
            server.most_busy = max(server.busy, server.most_busy)
        try:
            if gone or fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault in ("500", "429"):
                self._send(int(fault), b"{}", {"Retry-After": "0"})
            elif fault == "hang":
                time.sleep(0.6)
                self.close_connection = True
            elif fault == "nonsense":
                self._send(200, b'{"choices": []}')
            else:
                time.sleep(0.02)
                answer = {
                    "choices": [{"message": {"role": "assistant", "content": " Yes \n"}, "finish_reason": "stop"}]
                }
                whole = json.dumps(answer).encode()
                if fault != "cut":
                    with server.lock:
                        server.answered[key] += 1
                self._send(200, whole, cut=fault == "cut")
        finally:
            with server.lock:
                server.busy -= 1

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path, trained_config: Path) -> StreamConfig:
    return load_config(trained_config, [f"results_dir={tmp_path / 'results'}"])


def endpoint(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "llava", "timeout": 0.4, "pause": 0.01, "concurrency": 4, **changes})


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
    assert main(["compare", str(config.results_run_dir), str(path.parent)]) == 0
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
        EndpointError, match=r"no answer from llava in 3 attempts .* 3 of 8 answers to pathvqa are kept"
    ):
        evaluate_endpoint(config, endpoint(server, attempts=3))
    server.left = 10**9
    evaluate_endpoint(config, endpoint(server))
    assert sum(server.answered.values()) == 20 and set(server.answered.values()) == {1}


def test_a_refusal_ends_it_at_once_and_names_the_question(
    server: Server, config: StreamConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "do_POST", lambda self: self._send(404, b'{"error": "no model llava"}'))
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
        ([], "both, --endpoint URL and --model NAME"),
        (["--model", "m", "--stages", "all"], "do not go with --endpoint"),
        (["--model", "m", "--endpoint", "ftp://x/v1"], "expected an address such as"),
        (["--model", "m", "--endpoint", "http://me:secret@x/v1"], "set OPENAI_API_KEY"),
    ):
        assert main([*command, *arguments]) == 1
        assert message in (told := capsys.readouterr().err) and "secret" not in told
