"""Reads YAML from outside: plain values only, no repeated keys, limited in size and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mslora_cr.utils.regular import check_regular

MOST_BYTES = 1 << 18
"""The largest file: ten times what a run of a thousand tasks takes."""
MOST_NODES, MOST_LEVELS = 50_000, 100
"""The largest document once its anchors are expanded; a few lines of nested anchors would otherwise make billions."""
NOT_UTF8 = "not UTF-8 text; save the file as UTF-8"
_OF_CONSTRUCTORS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What PyYAML's constructors raise for nonsense after a tag, such as `!!int ""`."""


class _UniqueKeys(yaml.SafeLoader):
    """Loads plain YAML whose mappings name each key once; YAML itself would silently keep the last."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_size(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)  # `59:59:59` is a number of base 60, of any length.
        if not -(2**63) <= value < 2**63:
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return value


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that is too large, too deep or endless once its aliases are expanded."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, level: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise yaml.constructor.ConstructorError(None, None, "an anchor that contains itself", node.start_mark)
        if level > MOST_LEVELS:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", node.start_mark)
        open_nodes.add(id(node))
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        total = 1 + sum(size(part, level + 1) for part in inner)
        if total > MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_NODES:,} values, aliases expanded", node.start_mark
            )
        open_nodes.remove(id(node))
        sizes[id(node)] = total
        return total

    size(root, 0)


def read_plain_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, not UTF-8, or not plain YAML.
    """
    size = check_regular(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes; a configuration may have at most {MOST_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8) from None
    if "\0" in text:  # as in UTF-16 without a byte order mark
        raise ValueError(NOT_UTF8)
    return plain_yaml(text)


def plain_yaml(text: str) -> Any:
    """Read a YAML text.

    Raises:
        ValueError: It is not plain YAML, or its nesting or expansion exceeds `MOST_LEVELS` or `MOST_NODES`.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  (it is a SafeLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except _OF_CONSTRUCTORS as error:
        raise ValueError(f"a value that does not match its tag or form ({error})") from None
