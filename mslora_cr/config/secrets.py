"""Refuses secrets in a configuration, which is saved and shared with its run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mslora_cr.config.schema import ConfigError

_NAMES = re.compile(r"(?:.*_)?(?:token|password|passwd|secret|api_?key|access_?key|credentials?)", re.IGNORECASE)
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
"""Keys of the Hugging Face Hub, GitHub, OpenAI and AWS, private keys, and an address with a password."""


def check_values(node: Any, key_path: str = "") -> None:
    """Refuse secrets, and texts with a NUL character, which no path or name may contain.

    Raises:
        ConfigError: The message names the key, but never shows the value.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            inner = f"{key_path}.{key}" if key_path else str(key)
            if value not in (None, "") and isinstance(value, str) and _NAMES.fullmatch(str(key)):
                raise _secret(inner)
            check_values(value, inner)
    elif isinstance(node, list | tuple | set):
        for position, value in enumerate(node):
            check_values(value, f"{key_path}.{position}")
    elif isinstance(node, str):
        if "\0" in node:
            raise ConfigError(f"{key_path}: contains a NUL character")
        if _VALUES.search(node):
            raise _secret(key_path)


def _secret(key_path: str) -> ConfigError:
    return ConfigError(
        f"{key_path}: looks like a secret, and a configuration is saved with the run; remove it here, and put it into "
        "the environment (HF_TOKEN for the Hugging Face Hub, WANDB_API_KEY for W&B)"
    )
