"""Renders templates into pages: written whole, self-contained, with all data escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mslora_cr.evaluation.console import number
from mslora_cr.statistics.interval import span
from mslora_cr.utils.files import replacing

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, path: Path, context: Mapping[str, Any]) -> None:
    """Fill in a template and write the page, whole or not at all."""
    page = template.endswith(".html")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=page,
        finalize=None if page else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "span": span,
        "chance": chance,
        "duration": _duration,
        "brief": _brief,
        "count": _count,
        "capital": capital,
        "flat": _flat,
        "code": _markdown_code,
        "fenced": _markdown_block,
        "data": _embedded,
    }
    environment.globals |= {"script": _script, "script_sources": _script_sources()}
    text = environment.get_template(f"{template}.j2").render(context)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _script(name: str) -> Markup:
    """Return one of our own scripts, for a `script` element."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _script_sources() -> Markup:
    """Return the scripts that a page's security policy allows: ours, by their content, and none that data could add."""
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(TEMPLATES.glob("*.js"))]
    return Markup(" ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests))


def _embedded(content: Any) -> Markup:
    """Return JSON for a `script` element: no `<` in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def chance(p: float | None) -> str:
    """Return a p-value, which is never shown as zero."""
    return "–" if p is None else f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _brief(value: float | None) -> str:
    """Return a number with two significant digits."""
    return "–" if value is None else f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested mapping as lines of a table."""
    lines: dict[str, str] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            lines |= _flat(value, f"{prefix}{name} · ")
        elif isinstance(value, list):
            lines[f"{prefix}{name}"] = ", ".join(map(str, value)) or "none"
        elif value is not None:
            lines[f"{prefix}{name}"] = str(value)
    return lines


def _markdown(value: Any) -> Any:
    """Return text as Markdown that shows it unchanged, on one line, even in a table's cell; `Markup` stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]<>|#" else mark for mark in value)
    return " ".join(escaped.split())


def _markdown_code(text: str) -> Markup:
    """Return text as a span of code, in which nothing can be escaped."""
    cleaned = " ".join(text.replace("`", "'").replace("|", "¦").split())
    return Markup(f"`{cleaned}`")


def _markdown_block(text: str, language: str) -> Markup:
    """Return text as a block of code, with a fence that does not occur in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")
