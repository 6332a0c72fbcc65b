"""What a model thinks aloud before it answers, as reasoning models mark it: `<think>…</think>`."""

from __future__ import annotations

import re

_THOUGHT = re.compile(r"\A\s*(?:<think>)?.*?</think>\s*", re.DOTALL | re.IGNORECASE)
"""Templates may write the opening tag themselves, so that the answer begins behind it."""
_UNCLOSED = re.compile(r"\A\s*<think>", re.IGNORECASE)


def thinks(text: str) -> bool:
    """Whether an answer opens with thinking aloud."""
    return "think>" in text.lower() and bool(_THOUGHT.match(text) or _UNCLOSED.match(text))


def without_thinking(text: str) -> str:
    """The answer behind what was thought aloud; nothing where a limit cut it before it came to one."""
    if not thinks(text):
        return text
    return _THOUGHT.sub("", text, count=1) if _THOUGHT.match(text) else ""
