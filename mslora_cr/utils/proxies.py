"""Proxies that the environment names, for messages about failed requests."""

from __future__ import annotations

import os
from urllib.request import proxy_bypass

VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def proxy_variables(host: str = "") -> str:
    """Return the environment variables that name a proxy, in either spelling; none if NO_PROXY lists the host."""
    if host and proxy_bypass(host):
        return ""
    return ", ".join(name for name in (*VARIABLES, *map(str.lower, VARIABLES)) if os.environ.get(name))


def proxy_advice(host: str = "") -> str:
    """Return a sentence to append to the message about a failed request; empty without a proxy."""
    named = proxy_variables(host)
    if not named:
        return ""
    return (
        f". The request went through the proxy of {named}: check that it works, unset that variable, or put "
        f"{host or 'the host'} into NO_PROXY"
    )
