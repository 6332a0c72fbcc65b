"""Pages of the site that are made from the project itself: README and its neighbours, the schema, the docstrings.

mkdocs runs it (the gen-files plugin); nothing that it makes is written into docs/.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import mkdocs_gen_files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mslora_cr.config.methods import load_method, method_names
from mslora_cr.config.schema import StreamConfig
from mslora_cr.reporting.results_schema import results_schema

ROOT = Path(__file__).parents[1]
NEIGHBOURS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
ROOMS = [
    room for room in re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M) if room != "cli"
]
"""Rooms whose docstrings the reference shows, in README's order. The commands document themselves (`--help`)."""


def neighbour(text: str) -> str:
    """A page of the project's root as a page of the site: links into docs/ lose the folder, others their target."""

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        page, hash_sign, anchor = target.partition("#")
        if "://" in target or target.startswith("#"):
            return match[0]
        if page in NEIGHBOURS:
            return f"[{label}]({NEIGHBOURS[page]}{hash_sign}{anchor})"
        if page.startswith("docs/") and page.endswith(".md"):
            return f"[{label}]({page.removeprefix('docs/')}{hash_sign}{anchor})"
        return label

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, text)


def kind(annotation: Any) -> str:
    """A field's type in a word or two."""
    # Of an annotated type the first argument counts; None is shown as the default.
    arguments = [item for item in get_args(annotation) if isinstance(item, type | str) or get_args(item)]
    if get_origin(annotation) is None:
        return annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{argument}`" for argument in arguments)
    inner = [kind(argument) for argument in arguments if argument is not type(None)]
    name = getattr(get_origin(annotation), "__name__", "")
    return f"{name} of {', '.join(inner)}" if name in ("list", "dict") else " \\| ".join(inner)


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, if it is one, or a list or mapping of them."""
    found = [field.annotation, *get_args(field.annotation)]
    return next((item for item in found if isinstance(item, type) and issubclass(item, BaseModel)), None)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "a section" if isinstance(value, BaseModel) else f"`{value}`"


def section(model: type[BaseModel], path: str) -> list[str]:
    """A section's table, then those of its own sections."""
    lines = [f"## {path or 'Top level'}", "", (model.__doc__ or "").strip(), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    deeper: list[str] = []
    for name, field in model.model_fields.items():
        if field.exclude or name == "method_section":  # in a file it has the method's name
            continue
        inner = nested(field)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        described = "section" if inner else kind(field.annotation)
        lines.append(f"| `{name}` | {described} | {default(field)} | {meaning} |")
        if inner:
            deeper += section(inner, f"{path}.{name}".strip("."))
    return [*lines, "", *deeper]


def configuration() -> str:
    """The configuration reference."""
    opening = [
        "# Configuration",
        "",
        "Every key of a run's YAML file. Unknown keys are refused with the nearest known one. Any value can be set on",
        "the command line as `key.path=value`, of a task as `tasks.NAME.key=value` or `tasks.*.key=value`. The section",
        "of a method has the method's name: [methods](methods.md).",
        "",
        "The package ships configurations. Their names stand for files everywhere, in `training.deepspeed` too:",
        "`mslora-cr config list` lists them, `show NAME` prints one with what it extends, `copy NAME` copies it.",
        "",
    ]
    methods = {name: load_method(name).section for name in method_names()}
    sections = [line for name, model in methods.items() if model for line in section(model, name)]
    return "\n".join([*opening, *section(StreamConfig, ""), *sections])


def python() -> str:
    """The reference of public functions and classes, room by room."""
    lines = ["# Python", "", "`import mslora_cr` is cheap: what needs PyTorch is imported when it is used.", ""]
    lines += ["## mslora_cr", "", "::: mslora_cr.api", "    options: {heading_level: 3}", ""]
    for room in ROOMS:
        lines += [f"## mslora_cr.{room}", ""]
        for path in sorted((ROOT / "mslora_cr" / room).glob("*.py")):
            if path.stem != "__init__":
                lines += [f"::: mslora_cr.{room}.{path.stem}", "    options: {heading_level: 3}", ""]
    return "\n".join(lines)


for source, page in NEIGHBOURS.items():
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(neighbour((ROOT / source).read_text(encoding="utf-8")))
with mkdocs_gen_files.open("reference/results.schema.json", "w") as file:
    json.dump(results_schema(), file, indent=2)
for page, text in {"reference/configuration.md": configuration(), "reference/python.md": python()}.items():
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)
