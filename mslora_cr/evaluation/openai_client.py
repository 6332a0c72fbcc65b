"""A client for servers that speak OpenAI's chat completions: concurrent requests, retried after faults."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType
from typing import Any, Self

import httpx

from mslora_cr.distributed.comm import world_size
from mslora_cr.utils.errors import UserError

Body = Mapping[str, Any]
LONGEST_PAUSE = 30.0


class EndpointError(UserError):
    """A served model does not answer; what it has answered is kept."""


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: the server's address, up to and including `/v1`.
        model: the model's name on the server.
        concurrency: how many requests are open at once.
        timeout: seconds to wait for an answer.
        attempts: how often a request is sent before the evaluation ends.
        pause: seconds before the second attempt; each further pause is twice as long, up to half a minute.
        option: the command-line option that names the server, for messages.
        key: the environment variable that may hold the server's key.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 300.0
    attempts: int = 6
    pause: float = 1.0
    option: str = "--endpoint"
    key: str = "OPENAI_API_KEY"

    def check(self) -> None:
        """
        Raises:
            EndpointError: it cannot be asked.
        """
        if world_size() > 1:
            raise EndpointError(
                "a served model is asked from one process; start without a launcher, with --concurrency"
            )
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise EndpointError(f"{self.option} {self.url}: no address ({error})") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise EndpointError(f"{self.option} {self.url}: expected an address such as http://127.0.0.1:8000/v1")
        if url.userinfo:
            raise EndpointError(f"{self.option}: keep keys out of the address; set {self.key} in the environment")


def folder_name(model: str) -> str:
    """The model's name as a folder's, the same for the same name and for no other."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", model).strip("-.")[:80]
    return plain if plain == model else f"{plain or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


class Chat:
    """The connections to a served model; a context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._url = endpoint, f"{endpoint.url.rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {os.environ[endpoint.key]}"} if os.environ.get(endpoint.key) else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        self._client = httpx.Client(timeout=endpoint.timeout, headers=headers, limits=limits)
        self._lock, self._stopped = Lock(), Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask_each(
        self,
        items: Sequence[int],
        body: Callable[[int], Body],
        place: Callable[[int], str],
        note: Callable[[int, str], None],
    ) -> None:
        """Ask for every item, several at once.

        Args:
            body: of an item's request.
            place: an item in words, for messages.
            note: takes each answer as soon as it is there, one at a time.

        Raises:
            EndpointError: the server is gone, or refuses an item. UserError: as `body`.
        """

        def settle(item: int) -> None:
            answer = self._ask(body(item), place(item))
            if answer is not None:
                with self._lock:
                    note(item, answer)

        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            futures = [pool.submit(settle, item) for item in items]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:  # also Ctrl-C: the threads would go on
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _ask(self, body: Body, label: str) -> str | None:
        """The answer; None if everything ends meanwhile."""
        endpoint, problem = self._endpoint, ""
        for attempt in range(endpoint.attempts):
            pause = min(endpoint.pause * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0
            if self._stopped.wait(pause):
                return None
            try:
                response = self._client.post(self._url, json=body)
            except httpx.TransportError as error:  # refused, timed out, broken off
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            if response.is_success:
                text = _text_of(response)
                if text is not None:
                    return text
                problem = "an answer that is not a whole chat completion"
            elif response.status_code == 429 or response.status_code >= 500:
                problem = f"HTTP {response.status_code}"
                if response.headers.get("Retry-After", "").isdecimal():
                    self._stopped.wait(min(float(response.headers["Retry-After"]), LONGEST_PAUSE))
            else:
                raise EndpointError(
                    f"{self._url}: the server refuses {label} (HTTP {response.status_code}: {response.text[:300]!r})"
                )
        raise EndpointError(
            f"{self._url}: no answer from {body['model']} in {endpoint.attempts} attempts (last: {problem}); see "
            "whether the server runs and knows the model"
        )


def _text_of(response: httpx.Response) -> str | None:
    """The text of a chat completion; None if it is none."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if content is None:  # a refusal, or nothing but reasoning
        return ""
    return content.strip() if isinstance(content, str) else None
