import pytest

from mslora_cr.data.sources.download import MODELS, _explain
from mslora_cr.utils.proxies import VARIABLES, proxy_advice, proxy_variables


def test_a_proxy_is_named_unless_the_host_goes_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    assert proxy_variables() == proxy_advice("hub.example") == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:9")
    assert proxy_variables("hub.example") == "HTTPS_PROXY, all_proxy"
    message = _explain(MODELS["clip"], OSError("refused"), "https://hub.example")
    assert "the download stopped (refused)" in message
    assert message.endswith(
        "The request went through the proxy of HTTPS_PROXY, all_proxy: check that it works, unset that variable, or "
        "put hub.example into NO_PROXY"
    )
    monkeypatch.setenv("no_proxy", ".example")
    assert proxy_advice("hub.example") == ""
