"""A stand-in for a server of OpenAI's chat completions, with faults."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "hang", "cut", "nonsense", "429", "drop")


class Server(ThreadingHTTPServer):
    """Answers `reply(body)`. The first request of every question meets the next of `faults`; when `left` questions are
    answered, it hangs up on everything; where there is a `refusal`, it gives nothing else."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[dict[str, Any]], str] = lambda body: " Yes \n"
        self.faults: list[str] = []
        self.refusal = b""
        self.spoil: Callable[[bytes], bytes] = lambda whole: whole
        """Changes a whole reply before it is sent."""
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.left = 10**9
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.together = threading.Event()
        """Two requests were there at once."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
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
            if server.busy > 1:
                server.together.set()
        try:
            if server.refusal:
                self._send(404, server.refusal)
            elif gone or fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault in ("500", "429"):
                self._send(int(fault), b"{}", {"Retry-After": "0"})
            elif fault == "hang":
                self.rfile.read(1)  # until the client gives up
                self.close_connection = True
            elif fault == "nonsense":
                self._send(200, b'{"choices": []}')
            else:
                server.together.wait(0.5)  # for another, if there will be one
                answer = {
                    "choices": [
                        {"message": {"role": "assistant", "content": server.reply(body)}, "finish_reason": "stop"}
                    ]
                }
                whole = server.spoil(json.dumps(answer).encode())
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


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
