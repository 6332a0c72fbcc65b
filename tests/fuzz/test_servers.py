"""Servers between hostile parties: the web page and its clients, `evaluate --endpoint` and the model that is served."""

import asyncio
import gzip
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

import mslora_cr
from mslora_cr.config.load import load_config
from mslora_cr.evaluation.endpoint import evaluate_endpoint
from mslora_cr.evaluation.openai_client import MOST_BYTES, Chat, Endpoint, EndpointError
from mslora_cr.serving.web import MOST_FORM, make_app
from mslora_cr.utils.errors import UserError
from tests.fuzz import hostile
from tests.fuzz.surfaces import image
from tests.fuzz.test_fuzz import SEED, TIMES, time_limit
from tests.helpers.chat_server import serving

FIELDS = {"question": "what?", "of": "PCAM", "index": "0", "stages": "0", "boxes": "[]"}
TEXTS = [text for text in hostile.TEXTS if "\ud800" not in text]
REFUSED = (400, 403, 404, 405, 413, 422)


@pytest.fixture(scope="module")
def model(trained_config: Path) -> mslora_cr.AnsweringModel:
    return mslora_cr.load(trained_config)


@pytest.fixture(scope="module")
def app(model: mslora_cr.AnsweringModel) -> Any:
    return make_app(model, ["127.0.0.1"])


@pytest.fixture
def port(app: Any) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    listener.close()


# --- the page's clients --------------------------------------------------------------------------------------------


def upload(random: Random) -> bytes:
    return random.choice(
        (image(random), hostile.in_bytes(bytes(128) + b"DICM" + bytes(600), random), b"", b"\x93NUMPY")
    )


def request(client: TestClient, random: Random) -> httpx.Response:
    """One request that no page of ours makes."""
    fields = {**FIELDS, random.choice((*FIELDS, "task", "size")): random.choice(TEXTS)[:5_000]}
    kind = random.randrange(4)
    if kind == 0:
        path = random.choice(("/api/image", "/api/questions", "/api/run", "/", "/api/../../etc/passwd", "/page.js"))
        named = {"task": random.choice(("PCAM", *TEXTS))[:2_000], "index": str(random.choice(hostile.NUMBERS))[:400]}
        return client.get(path, params=named)
    path = random.choice(("/api/ask", "/api/preview"))
    if kind == 1:
        return client.post(path, data=fields, files={"image": (random.choice(TEXTS)[:100] or "x", upload(random))})
    if kind == 2:
        headers = {"content-type": random.choice(("multipart/form-data; boundary=x", "multipart/form-data", "text/x"))}
        whole = (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + upload(random) + b"\r\n--x--"
        )
        return client.post(path, content=hostile.in_bytes(whole, random), headers=headers)
    headers = {
        random.choice(("host", "origin")): random.choice(("evil.example", "127.0.0.1.evil.example", "[::", "null"))
    }
    return client.post(path, data=FIELDS, headers=headers)


def test_hostile_requests(app: Any) -> None:
    """Every one is answered, or refused with a reason; an error of the program's own would be raised here."""
    client = TestClient(app, base_url="http://127.0.0.1")
    for number in range(60 * TIMES):
        with time_limit():
            response = request(client, Random(f"{SEED} web {number}"))
        assert response.status_code in (200, *REFUSED), (number, response.status_code, response.text[:200])
        if response.status_code in (400, 404, 413) and response.headers["content-type"] == "application/json":
            assert response.json()["error"], number
    assert client.post("/api/ask", data=FIELDS).status_code == 200


def test_a_body_without_end_is_refused_as_it_is_read(app: Any) -> None:
    """A file of a form goes to disk as it comes: nothing of what is too large may."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while sent < 4 * MOST_FORM:
            sent += 1 << 20
            yield bytes(1 << 20)

    async def receive_all() -> int:
        pieces = endless()
        messages: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": next(pieces), "more_body": True}

        async def send(message: Any) -> None:
            messages.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=x")]
        scope = {"type": "http", "method": "POST", "path": "/api/ask", "headers": headers, "query_string": b""}
        await app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)
        return int(messages[0]["status"])

    assert asyncio.run(receive_all()) == 413
    assert sent <= MOST_FORM + (2 << 20)


def test_slow_and_vanishing_clients_keep_nobody_waiting(port: int) -> None:
    begun = b"POST /api/ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\nContent-Type: text/x\r\n\r\n"
    slow = []
    for number in range(30):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(begun[: 20 + 3 * number] if number % 2 else begun + b"x" * number)
        if number % 3:
            slow.append(client)  # says nothing more
        else:
            client.close()
    response = httpx.post(f"http://127.0.0.1:{port}/api/ask", data=FIELDS, timeout=20)
    assert response.status_code == 200
    for client in slow:
        client.close()


# --- the model that is served --------------------------------------------------------------------------------------

LOGPROBS = {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": [{"token": "Yes", "logprob": -0.1}]}]}
REPLY = {
    "choices": [{"message": {"role": "assistant", "content": "Yes"}, "finish_reason": "stop", "logprobs": LOGPROBS}]
}


def spoiled(random: Random) -> Callable[[bytes], bytes]:
    def change(_: bytes) -> bytes:
        content = json.dumps(REPLY).encode()
        return random.choice((hostile.in_json, hostile.in_json, hostile.in_bytes))(content, random)

    return change


def test_hostile_replies(trained_config: Path, tmp_path: Path) -> None:
    """They are scored, or end the evaluation with a reason; and what is kept of them can be read again."""
    for number in range(15 * TIMES):
        config = load_config(trained_config, [f"results_dir={tmp_path / str(number)}"])
        with serving() as server, time_limit():
            server.spoil = spoiled(Random(f"{SEED} served {number}"))
            asked = Endpoint(server.url, "m", timeout=5, attempts=2, pause=0)
            for _ in range(2):
                try:
                    evaluate_endpoint(config, asked, "PCAM")
                except UserError as error:
                    assert len(str(error)) > 20, number


@pytest.mark.parametrize("kind", ["endless", "bomb", "damaged"])
def test_replies_without_bounds(kind: str) -> None:
    """A reply that does not end, in size or in time, or that unpacks to far more than was sent."""
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as file:
        file.write(bytes(MOST_BYTES + (1 << 20)))
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(1 << 16)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            try:
                if kind == "endless":
                    connection.sendall(head + b"Content-Length: 100000\r\n\r\n")
                    while not stop.wait(0.05):
                        connection.sendall(b" ")
                else:
                    content = bomb.getvalue() if kind == "bomb" else b"no gzip"
                    length = f"Content-Encoding: gzip\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                    connection.sendall(head + length + content)
            except OSError:
                pass
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    reason = {"endless": "does not end|ReadTimeout", "bomb": "a reply of more than 16 MB", "damaged": "DecodingError"}[
        kind
    ]
    endpoint = Endpoint(
        f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", timeout=0.5 if kind == "endless" else 20, attempts=1
    )
    with time_limit(), Chat(endpoint) as chat, pytest.raises(EndpointError, match=reason):
        chat.ask_each([0], lambda item: {"model": "m"}, str, lambda item, reply: None)
    stop.set()
    listener.close()
