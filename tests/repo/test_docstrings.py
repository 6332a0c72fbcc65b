"""Docstrings against signatures: each documented parameter or attribute exists and has a line of its own."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

import mslora_cr

PACKAGE = Path(mslora_cr.__file__).parent


@pytest.fixture(scope="module")
def package() -> griffe.Object:
    """The package as mkdocstrings reads it: from the source, without importing it."""
    return griffe.load(PACKAGE, resolve_aliases=False, try_relative_path=False)


def documented(owner: griffe.Object | griffe.Alias) -> Iterator[griffe.Object]:
    """Every function, class and method that the package defines, private ones included."""
    for member in owner.members.values():
        if not isinstance(member, griffe.Alias) and not member.is_attribute:
            if member.docstring:
                yield member
            yield from documented(member)


def entries(found: griffe.Object) -> Iterator[tuple[str, str]]:
    """Name and description of each line of a docstring's `Args:` and `Attributes:`."""
    for heading in ("Args", "Attributes"):
        section = re.search(rf"^{heading}:\n((?:    .*\n?|\n(?=    ))+)", inspect.cleandoc(found.docstring.value), re.M)
        for entry in re.split(r"\n(?=    \S)", section[1].rstrip()) if section else ():
            name, _, description = entry.strip().partition(":")
            yield name.lstrip("*"), description


def names(found: griffe.Object) -> set[str]:
    """What a docstring may document: a function's parameters; a class's attributes and those of its `__init__`."""
    if isinstance(found, griffe.Function):
        return {parameter.name.lstrip("*") for parameter in found.parameters}
    parameters = {parameter.name for parameter in found.parameters} if isinstance(found, griffe.Class) else set()
    return parameters | set(found.all_members if isinstance(found, griffe.Class) else found.members)


def problems(found: griffe.Object) -> list[str]:
    known = names(found)
    wrong = [f"{found.path}: no {name!r}" for name, _ in entries(found) if name not in known]
    swallowed = [
        f"{found.path}: {name} shares a line with {other}"
        for name, description in entries(found)
        for other in re.findall(r"[.;] (\w+): ", description)
        if other in known
    ]
    return [*wrong, *swallowed]


def test_documented_parameters_are_those_of_the_signature(package: griffe.Object) -> None:
    every = list(documented(package))
    assert sum(len(list(entries(found))) for found in every) > 500
    assert not [problem for found in every for problem in problems(found)]
