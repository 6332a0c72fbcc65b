"""Reads YAML from outside: plain values only, no repeated keys, within bounds of size and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mslora_cr.utils.regular import check_regular

MOST_BYTES = 1 << 18
"""Of a file: ten times what a run of a thousand tasks takes."""
MOST_NODES, MOST_LEVELS = 50_000, 100
"""Of a document once its anchors are expanded: a few lines of nested anchors would make billions."""
_OF_CONSTRUCTORS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What PyYAML's constructors raise of nonsense behind a tag, such as `!!int ""`."""


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML whose mappings name each key once: YAML itself would silently keep the last."""

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
        value = super().construct_yaml_int(node)  # `59:59:59` is a number of base 60, of any length
        if not -(2**63) <= value < 2**63:
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return value


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that is too large, too deep or endless once every alias stands for what it names."""
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
        OSError: it cannot be read.
        ValueError: it is too large, not UTF-8, or not plain YAML.
    """
    size = check_regular(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes, and a configuration of more than {MOST_BYTES:,} is not read")
    try:
        return plain_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save the file as UTF-8") from None


def plain_yaml(text: str) -> Any:
    """Read a YAML text.

    Raises:
        ValueError: it is not plain YAML, or nested or expanded beyond `MOST_LEVELS` and `MOST_NODES`.
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
        raise ValueError(f"a value that is not what its tag or form says ({error})") from None
