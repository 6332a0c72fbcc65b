"""Proxies of the environment: this machine's own servers go past them, and errors name their variables."""

import pytest

from mslora_cr.evaluation.openai_client import Chat, Endpoint, EndpointError


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:7890/", "socks5://127.0.0.1:7890"])
def test_a_proxy_that_cannot_be_used_is_named(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(EndpointError, match=r"a proxy that cannot be used \(ALL_PROXY\).*NO_PROXY"):
        Chat(Endpoint("http://model.example/v1", "m"))
    with Chat(Endpoint("http://127.0.0.1:8000/v1", "m")):
        pass


def test_an_error_through_a_proxy_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALL_PROXY", "HTTPS_PROXY", "all_proxy", "https_proxy", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    endpoint = Endpoint("http://model.example/v1", "m", attempts=1)
    with Chat(endpoint) as chat, pytest.raises(EndpointError, match="through the proxy of HTTP_PROXY"):
        chat.ask_each([0], lambda item: {"model": "m"}, str, lambda item, text: None)
