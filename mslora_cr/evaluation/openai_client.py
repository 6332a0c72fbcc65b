"""A client for servers that speak OpenAI's chat completions: concurrent requests, retried after faults."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from mslora_cr.distributed.comm import world_size
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)

Body = Mapping[str, Any]
PASSING = (408, 409, 425, 429)
"""Statuses of clients' errors that another attempt may mend."""
TOP_LOGPROBS = 20
"""The most that OpenAI's servers tell."""
LONGEST_PAUSE = 30.0


LOCAL = ("127.0.0.1", "localhost", "::1")
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def proxy_variables() -> str:
    """The variables of the environment that name a proxy, in either spelling."""
    return ", ".join(name for name in (*PROXIES, *map(str.lower, PROXIES)) if os.environ.get(name))


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
        local = httpx.URL(endpoint.url).host in LOCAL  # no proxy reaches this machine's own servers
        self._proxies = "" if local else proxy_variables()
        try:
            self._client = httpx.Client(timeout=endpoint.timeout, headers=headers, limits=limits, trust_env=not local)
        except (ValueError, ImportError) as error:
            raise EndpointError(
                f"{endpoint.option}: the environment names a proxy that cannot be used ({self._proxies}): {error}. "
                "Unset that variable, or put the server's host into NO_PROXY"
            ) from None
        self._lock, self._stopped = Lock(), Event()
        self._dialect = Dialect()

    @property
    def greedy(self) -> bool:
        """Whether every answer so far was asked for at temperature 0."""
        return self._dialect.greedy

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
        locate: Callable[[int], str],
        note: Callable[[int, Reply], None],
    ) -> None:
        """Ask for every item, several at once.

        Args:
            body: of an item's request.
            locate: an item in words, for messages.
            note: takes each answer as soon as it is there, one at a time.

        Raises:
            EndpointError: the server is gone, or refuses an item. UserError: as `body`.
        """

        def settle(item: int) -> None:
            answer = self._ask(body(item), locate(item))
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

    def _ask(self, body: Body, label: str) -> Reply | None:
        """The answer; None if everything ends meanwhile."""
        endpoint, problem, attempt = self._endpoint, "", 0
        while attempt < endpoint.attempts:
            pause = min(endpoint.pause * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0
            if self._stopped.wait(pause):
                return None
            sent = self._dialect.spelled(body)
            attempt += 1
            try:
                response = self._client.post(self._url, json=sent)
            except httpx.TransportError as error:  # refused, timed out, broken off
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                problem += f", through the proxy of {self._proxies}" if self._proxies else ""
                continue
            failure = failure_of(response)
            if failure is None:
                reply = reply_of(response)
                if reply is not None:
                    return reply
                problem = "an answer that is not a whole chat completion"
            elif failure.passes:
                problem = f"HTTP {failure.status}"
                if response.headers.get("Retry-After", "").isdecimal():
                    self._stopped.wait(min(float(response.headers["Retry-After"]), LONGEST_PAUSE))
            elif self._dialect.learn(sent, failure):
                attempt -= 1
            else:
                raise EndpointError(
                    f"{self._url}: the server refuses {label} (HTTP {failure.status}: {failure.text[:300]!r})"
                )
        raise EndpointError(
            f"{self._url}: no answer from {body['model']} in {endpoint.attempts} attempts (last: {problem}); see "
            "whether the server runs and knows the model"
        )


class Reply(NamedTuple):
    """A chat completion.

    Attributes:
        text: the answer, outer white space removed; empty where there is none.
        reason: why the server stopped: its `finish_reason`, or "refusal".
        logprobs: log-probabilities of the tokens; None where the server does not tell.
        first: the likeliest first tokens and their log-probabilities, as far as the server tells.
    """

    text: str
    reason: str | None = None
    logprobs: tuple[float, ...] | None = None
    first: Mapping[str, float] = {}


class Failure(NamedTuple):
    """Why there is no reply."""

    status: int
    text: str

    @property
    def passes(self) -> bool:
        """Whether another attempt may succeed."""
        return self.status in PASSING or self.status >= 500


def failure_of(response: httpx.Response) -> Failure | None:
    """What went wrong, also where a server says so inside a 200; None where nothing did."""
    if not response.is_success:
        return Failure(response.status_code, response.text)
    try:
        content = response.json()
    except (ValueError, RecursionError):
        return None
    error = content.get("error") if isinstance(content, dict) and not content.get("choices") else None
    if not error:
        return None
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return Failure(int(code) if re.fullmatch("[45][0-9][0-9]", code) else 400, response.text)


def reply_of(response: httpx.Response) -> Reply | None:
    """The chat completion; None if it is none."""
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        text = _text_of(message["content"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if text is None:
        return None
    reason = "refusal" if message.get("refusal") else choice.get("finish_reason")
    logprobs, first = _logprobs_of(choice.get("logprobs"))
    return Reply(text.strip(), reason if isinstance(reason, str) else None, logprobs, first)


def _text_of(content: Any) -> str | None:
    """Of a message's content: a text, its parts, of which thinking is none of the answer, or nothing."""
    if content is None:  # a refusal, or nothing but reasoning
        return ""
    if isinstance(content, list):
        parts = [part["text"] for part in content if part["type"] in _TEXTS]
        return "".join(map(str, parts))
    return content if isinstance(content, str) else None


_TEXTS = ("text", "output_text")


def _logprobs_of(reply: Any) -> tuple[tuple[float, ...] | None, dict[str, float]]:
    try:
        tokens: Sequence[Any] = reply["content"]
        logprobs = tuple(float(token["logprob"]) for token in tokens)
        likely = tokens[0].get("top_logprobs") or []
        return logprobs, {str(token["token"]): float(token["logprob"]) for token in likely}
    except (LookupError, TypeError, ValueError, AttributeError):
        return None, {}


class Dialect:
    """How a server spells the fields of a request, learned from what it refuses; for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._limit = "max_tokens"
        self._left_out: set[str] = set()

    @property
    def greedy(self) -> bool:
        return "temperature" not in self._left_out

    def spelled(self, body: Body) -> dict[str, Any]:
        """A request in the server's dialect."""
        with self._lock:
            sent = {key: value for key, value in body.items() if key not in self._left_out}
            if "max_tokens" in sent:
                sent[self._limit] = sent.pop("max_tokens")
            return sent

    def learn(self, sent: Body, failure: Failure) -> bool:
        """Whether the same request may be sent again, spelled otherwise.

        Args:
            sent: what was refused, as it was spelled.
        """
        if failure.status not in (400, 422):
            return False
        with self._lock:
            if "max_tokens" in sent and "max_tokens" in failure.text:
                self._limit = "max_completion_tokens"
            elif "temperature" in sent and "temperature" in failure.text:
                self._leave_out("temperature")
                log.warning("the server does not take temperature 0: its answers are not greedy")
            elif "logprobs" in sent:
                self._leave_out("logprobs", "top_logprobs")
            else:
                return False
        return True

    def _leave_out(self, *fields: str) -> None:
        self._left_out.update(fields)
