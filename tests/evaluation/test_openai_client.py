"""What servers of chat completions say, and how they spell it."""

from typing import Any

import httpx
import pytest

from mslora_cr.evaluation.openai_client import Dialect, Failure, Reply, failure_of, reply_of


def completion(message: dict[str, Any], **choice: Any) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": message, **choice}]})


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("response", "reply"),
    [
        (completion({"content": " yes \n"}, finish_reason="stop"), Reply("yes", "stop")),
        (completion({"content": None, "reasoning_content": "It"}, finish_reason="length"), Reply("", "length")),
        (completion({"content": None, "refusal": "I can't."}, finish_reason="stop"), Reply("", "refusal")),
        (completion({"content": [THINKING, {"type": "text", "text": "tumor"}]}), Reply("tumor")),
        (completion({"content": [{"type": "text"}]}), None),
        (completion({"content": [{"type": "text", "text": None}]}), None),
        (
            completion({"content": ["tu", {"type": "text", "text": {"value": "mor", "annotations": []}}]}),
            Reply("tumor"),
        ),
        (completion({"reasoning_content": "It"}, finish_reason="length"), Reply("", "length")),
        (completion({"content": 3}), None),
        (httpx.Response(200, json={"choices": []}), None),
        (httpx.Response(200, content=b"{"), None),
    ],
)
def test_replies(response: httpx.Response, reply: Reply | None) -> None:
    assert reply_of(response) == reply


def test_the_end_at_the_limit_has_several_names() -> None:
    assert [Reply("", reason).cut for reason in (None, "stop", "length", "MAX_TOKENS")] == [False, False, True, True]


def test_log_probabilities_as_far_as_they_are_told() -> None:
    top = [{"token": "Yes", "logprob": -0.1}, {"token": "No", "logprob": -2.5}]
    tokens = [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}, {"token": ".", "logprob": -0.2}]
    reply = reply_of(completion({"content": "Yes."}, logprobs={"content": tokens}))
    assert reply is not None and reply.logprobs == (-0.1, -0.2) and reply.first == {"Yes": -0.1, "No": -2.5}
    untold = reply_of(completion({"content": "Yes."}, logprobs={"content": [{"token": "Yes"}]}))
    assert untold is not None and untold.logprobs is None and untold.first == {}


@pytest.mark.parametrize(
    ("response", "status", "passes"),
    [
        (httpx.Response(200, json={"error": {"message": "Insufficient credits", "code": 402}}), 402, False),
        (httpx.Response(200, json={"error": {"message": "overloaded", "code": 503}}), 503, True),
        (httpx.Response(200, json={"error": "no"}), 400, False),
        (completion({"content": ""}, error={"message": "lost", "code": 502}, finish_reason="error"), 502, True),
        (httpx.Response(200, json={"object": "error", "message": "no such model", "code": 404}), 404, False),
        (httpx.Response(408, text=""), 408, True),
        (httpx.Response(425, text=""), 425, True),
        (httpx.Response(404, text=""), 404, False),
    ],
)
def test_failures(response: httpx.Response, status: int, passes: bool) -> None:
    failure = failure_of(response)
    assert failure is not None and (failure.status, failure.passes) == (status, passes)


def test_no_failure_where_there_is_a_reply() -> None:
    assert failure_of(httpx.Response(200, json={"choices": [{}], "error": None})) is None


def test_fields_are_spelled_as_the_server_takes_them() -> None:
    dialect = Dialect()
    body = {"model": "m", "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert dialect.spelled(body) == body and dialect.greedy
    refusals = ("use max_completion_tokens in place of max_tokens", "temperature does not support 0", "unknown field")
    for text in refusals:
        assert dialect.learn(dialect.spelled(body), Failure(400, text))
    assert dialect.spelled(body) == {"model": "m", "max_completion_tokens": 5} and not dialect.greedy
    assert not dialect.learn(dialect.spelled(body), Failure(400, "max_tokens"))  # nothing is left to change
    assert not Dialect().learn(body, Failure(404, "max_tokens"))
