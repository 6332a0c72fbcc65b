"""Hostile values, and what makes a sound file hostile. Everything comes from one random generator, so a seed tells all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

DEEP = "[" * 5_000
TEXTS = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\x1b[2J\x1b]0;title\x07",
        "\u202egnp.exe",
        "\ud800",
        "é",
        "…",
        "NaN",
        "null",
        "~",
        "no",
        "-",
        ".",
    ),
    *("..", "../evil", "/etc/passwd", "C:\\evil", "..\\..\\evil", "a/../../evil", "//host/share", "~/evil", "x" * 300),
    *(
        "x" * 100_000,
        "<image>" * 50,
        "<script>alert(1)</script>",
        "| a | b |",
        "=cmd()",
        "'; drop",
        "%s%n{0}",
        "A",
        "?",
    ),
    *("model.language_model.layers.\u0661.mlp.up_proj", "layers.²", "con", "\ufeff", "a\nb", "a\rb", "$(touch evil)"),
]
NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 0.5, float("nan"), float("inf")]
CONTAINERS: list[Any] = [[], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}}, [[1, 2], [3]], ["x"] * 2_000]
TOKENS = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"1e999",
        b"NaN",
        b"9" * 5_000,
        b"\\ud800",
        b"\\u0000",
        b"\r",
        b"\x1b[2J",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"&a *a",
        b"!!python/object:os.system",
        b"<<: *x",
        b"- " * 500,
        b"%",
        b"\t",
    ),
    *(
        DEEP.encode(),
        b'{"a":' * 5_000,
        b"../",
        b"\x80\x02.",
        b"c__builtin__\neval\n(V1\ntR.",
        b"PK\x05\x06" + bytes(18),
    ),
]


def value(random: Random) -> Any:
    """A value that is rarely the right one."""
    kind = random.choice((TEXTS, TEXTS, NUMBERS, CONTAINERS, [None, True, False]))
    return random.choice(kind)  # type: ignore[arg-type]  # lists of different kinds


def in_bytes(content: bytes, random: Random) -> bytes:
    """A few changes to a file's bytes: cut, doubled, flipped, with a token where none belongs."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        start = random.randrange(len(data) + 1)
        length = random.choice((1, 4, 40, 400))
        change = random.randrange(5)
        if change == 0:
            del data[start:]
        elif change == 1:
            del data[start : start + length]
        elif change == 2:
            data[start:start] = data[start : start + length]
        elif change == 3 and start < len(data):
            data[start] ^= 1 << random.randrange(8)
        else:
            data[start:start] = random.choice(TOKENS)
    return bytes(data)


def in_json(content: bytes, random: Random) -> bytes:
    """One value, key or element of a JSON text replaced, removed, or given twice; now and then its bytes too."""
    node: Any = json.loads(content)
    root = [node]
    places: list[tuple[Any, Any]] = []
    _collect(root, places)
    for _ in range(random.choice((1, 1, 3))):
        holder, key = random.choice(places)
        change = random.randrange(4)
        if change == 0 and isinstance(holder, dict):
            holder.pop(key, None)
            holder[str(random.choice(TEXTS))] = value(random)
        elif change == 1 and isinstance(holder, dict):
            holder.pop(key, None)
        else:
            holder[key] = value(random)
    text = json.dumps(root[0])
    if random.random() < 0.2 and "{" in text:  # a key twice
        text = text.replace("{", '{"id": 1, "id": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, child in items[:50]:
        places.append((node, key))
        _collect(child, places)


def in_lines(content: bytes, random: Random) -> bytes:
    """One line of a JSONL file made hostile, doubled or removed."""
    lines = content.splitlines(keepends=True)
    number = random.randrange(len(lines))
    change = random.randrange(4)
    if change == 0:
        lines[number:number] = lines[number : number + 1]
    elif change == 1:
        lines[number] = in_bytes(lines[number], random)
    else:
        lines[number] = in_json(lines[number], random) + b"\n"
    return b"".join(lines)


Mutation = Callable[[bytes, Random], bytes]


def of_same_type(content: bytes, random: Random) -> bytes:
    """Values of a JSON text replaced by others of their type that occur in it, or by empty ones: the types stay right."""
    root = [json.loads(content)]
    places: list[tuple[Any, Any]] = []
    _collect(root, places)
    for _ in range(random.choice((1, 1, 2))):
        holder, key = random.choice(places)
        old = holder[key]
        alike = [other[index] for other, index in places if type(other[index]) is type(old)]
        holder[key] = copy.deepcopy(random.choice((type(old)(), random.choice(alike))))
    return json.dumps(root[0]).encode()
