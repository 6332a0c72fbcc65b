"""A client for servers that speak OpenAI's chat completions: concurrent requests, retried after faults."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from mslora_cr.distributed.comm import world_size
from mslora_cr.utils.errors import UserError, shorten
from mslora_cr.utils.proxies import proxy_variables

log = logging.getLogger(__name__)

Body = Mapping[str, Any]
PASSING = (408, 409, 425, 429)
"""Statuses of client errors after which another attempt may succeed."""
CUT_REASONS = ("length", "max_tokens", "model_length")
"""What servers call the end of an answer at the limit of tokens."""
TOP_LOGPROBS = 20
"""The most alternatives per token that OpenAI's servers report."""
LONGEST_PAUSE = 30.0
MOST_BYTES = 16 << 20
"""The largest reply, once it is unpacked."""


LOCAL = ("127.0.0.1", "localhost", "::1")


class EndpointError(UserError):
    """A served model does not answer. The answers that it has given are kept."""


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: The server's address, up to and including `/v1`.
        model: The model's name on the server.
        concurrency: The number of requests that are open at once.
        timeout: Seconds to wait for an answer.
        attempts: How often a request is sent before the evaluation ends.
        pause: Seconds before the second attempt; each further pause is twice as long, up to half a minute.
        option: The command-line option that names the server, for messages.
        key: The environment variable that may hold the server's key.
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
        """Check that the server can be asked.

        Raises:
            EndpointError: It cannot.
        """
        if world_size() > 1:
            raise EndpointError(
                "a served model is asked from one process; start without a launcher, and use --concurrency"
            )
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise EndpointError(f"{self.option} {self.url}: not an address ({error})") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise EndpointError(f"{self.option} {self.url}: expected an address such as http://127.0.0.1:8000/v1")
        if url.userinfo:
            raise EndpointError(f"{self.option}: keep keys out of the address; set {self.key} in the environment")


def folder_name(model: str) -> str:
    """Return a folder name for a model's name; different names give different folders."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", model).strip("-.")[:80]
    return plain if plain == model else f"{plain or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


class Chat:
    """The connections to a served model; a context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._url = endpoint, f"{endpoint.url.rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {os.environ[endpoint.key]}"} if os.environ.get(endpoint.key) else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        host = httpx.URL(endpoint.url).host
        local = host in LOCAL  # No proxy reaches servers on this machine.
        self._proxies = "" if local else proxy_variables(host)
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
        """Whether every answer so far was requested at temperature 0."""
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
            body: Makes an item's request.
            locate: Describes an item, for messages.
            note: Called with each answer as soon as it arrives, one at a time.

        Raises:
            EndpointError: The server is gone, or refuses an item.
            UserError: As `body`.
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
            except BaseException:  # Ctrl-C leads here too: the threads would continue.
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _ask(self, body: Body, label: str) -> Reply | None:
        """Return the answer; None if everything ends meanwhile."""
        endpoint, problem, attempt = self._endpoint, "", 0
        while attempt < endpoint.attempts:
            pause = min(endpoint.pause * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0
            if self._stopped.wait(pause):
                return None
            sent = self._dialect.spelled(body)
            attempt += 1
            try:
                response = self._post(sent)
            except (httpx.TransportError, httpx.DecodingError) as error:  # Refused, timed out, broken off, or damaged.
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                problem += f", through the proxy of {self._proxies}" if self._proxies else ""
                continue
            failure = failure_of(response)
            if failure is None:
                reply = reply_of(response)
                if reply is not None:
                    return reply
                problem = f"an answer that is not a complete chat completion: {shorten(response.text)}"
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

    def _post(self, body: Body) -> httpx.Response:
        """Send a request and read its reply, within limits of size and time."""
        begun, content = time.monotonic(), bytearray()
        with self._client.stream("POST", self._url, json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MOST_BYTES:
                    raise httpx.ReadError(f"a reply of more than {MOST_BYTES >> 20} MB")
                if time.monotonic() - begun > self._endpoint.timeout:
                    raise httpx.ReadTimeout("the reply does not end")
            headers = {name: response.headers[name] for name in ("Retry-After",) if name in response.headers}
            return httpx.Response(response.status_code, headers=headers, content=bytes(content))


class Reply(NamedTuple):
    """A chat completion.

    Attributes:
        text: The answer without outer white space; empty if there is none.
        reason: Why the server stopped: its `finish_reason`, or "refusal".
        logprobs: Log-probabilities of the tokens; None if the server does not report them.
        first: The likeliest first tokens and their log-probabilities, as far as the server reports them.
    """

    text: str
    reason: str | None = None
    logprobs: tuple[float, ...] | None = None
    first: Mapping[str, float] = {}

    @property
    def cut(self) -> bool:
        """Whether the answer was cut at the limit of tokens."""
        return self.reason is not None and self.reason.lower() in CUT_REASONS


class Failure(NamedTuple):
    """Why there is no reply."""

    status: int
    text: str

    @property
    def passes(self) -> bool:
        """Whether another attempt may succeed."""
        return self.status in PASSING or self.status >= 500


def failure_of(response: httpx.Response) -> Failure | None:
    """Return the problem with a response, even if its status is 200; None if there is none."""
    if not response.is_success:
        return Failure(response.status_code, response.text)
    try:
        content = response.json()
    except (ValueError, RecursionError):
        return None
    error = _error_in(content)
    if not error:
        return None
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return Failure(int(code) if re.fullmatch("[45][0-9][0-9]", code) else 400, response.text)


def _error_in(content: Any) -> Any:
    """The error that a reply reports, in place of its choices or in the first of them."""
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    if not choices:
        return content.get("error") or (content if content.get("object") == "error" else None)
    return choices[0].get("error") if isinstance(choices, list) and isinstance(choices[0], dict) else None


def reply_of(response: httpx.Response) -> Reply | None:
    """Return the chat completion; None if it is not one."""
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        text = _text_of(message.get("content"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if text is None:
        return None
    reason = "refusal" if message.get("refusal") else choice.get("finish_reason")
    logprobs, first = _logprobs_of(choice.get("logprobs"))
    return Reply(_encodable(text).strip(), _encodable(reason) if isinstance(reason, str) else None, logprobs, first)


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot encode: JSON may contain half of a surrogate pair."""
    return text.encode(errors="replace").decode()


def _text_of(content: Any) -> str | None:
    """Return the text of a message's content, which may be a text, parts (without those of reasoning), or nothing."""
    if content is None:  # It is a refusal, or nothing but reasoning.
        return ""
    if isinstance(content, list):
        parts = [_text_in(part) for part in content if isinstance(part, str) or part["type"] in _TEXTS]
        return None if None in parts else "".join(str(part) for part in parts)
    return content if isinstance(content, str) else None


_TEXTS = ("text", "output_text")


def _text_in(part: Any) -> str | None:
    """The text of a part, which may stand in a `value` of its own; None if there is none."""
    text = part if isinstance(part, str) else part["text"]
    text = text["value"] if isinstance(text, dict) else text
    return text if isinstance(text, str) else None


def _logprobs_of(reply: Any) -> tuple[tuple[float, ...] | None, dict[str, float]]:
    try:
        tokens: Sequence[Any] = reply["content"]
        logprobs = tuple(_finite(token["logprob"]) for token in tokens)
        likely = tokens[0].get("top_logprobs") or []
        return logprobs, {str(token["token"]): _finite(token["logprob"]) for token in likely}
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None, {}


def _finite(value: Any) -> float:
    """Convert a log-probability."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no log-probability")
    return number


class Dialect:
    """How a server spells the fields of a request, learned from its refusals; safe for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._limit = "max_tokens"
        self._left_out: set[str] = set()

    @property
    def greedy(self) -> bool:
        return "temperature" not in self._left_out

    def spelled(self, body: Body) -> dict[str, Any]:
        """Return a request in the server's dialect."""
        with self._lock:
            sent = {key: value for key, value in body.items() if key not in self._left_out}
            if "max_tokens" in sent:
                sent[self._limit] = sent.pop("max_tokens")
            return sent

    def learn(self, sent: Body, failure: Failure) -> bool:
        """Return whether the same request may be sent again in another spelling.

        Args:
            sent: The refused request, as it was spelled.
        """
        if failure.status not in (400, 422):
            return False
        with self._lock:
            if "max_tokens" in sent and "max_tokens" in failure.text:
                self._limit = "max_completion_tokens"
            elif "temperature" in sent and "temperature" in failure.text:
                self._leave_out("temperature")
                log.warning("the server does not accept temperature 0: its answers are not greedy")
            elif "logprobs" in sent:
                self._leave_out("logprobs", "top_logprobs")
            else:
                return False
        return True

    def _leave_out(self, *fields: str) -> None:
        self._left_out.update(fields)
