"""Reads a run's YAML file: layers of `extends`, `key.path=value` overrides, errors that name the nearest known key."""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, ValidationError

from mslora_cr.config.consent import note_consent
from mslora_cr.config.derived import DERIVED_TRAINING_FIELDS
from mslora_cr.config.methods import if_trusted
from mslora_cr.config.plain_yaml import MOST_BYTES, plain_yaml, read_plain_yaml
from mslora_cr.config.schema import (
    CATALOGUE,
    ConfigError,
    DatasetConfig,
    StreamConfig,
    TaskConfig,
    as_number,
)
from mslora_cr.config.secrets import check_values
from mslora_cr.config.shipped import find_config, find_deepspeed
from mslora_cr.config.validation import OWN_TRAINING_FIELDS, validation_fields
from mslora_cr.utils.errors import nearest, shorten
from mslora_cr.utils.visible import visible

SAVE_STRATEGIES = ("steps", "epoch", "no")
"""When checkpoints may be written. transformers also has `best`, in place of which there is `training.keep`."""
WORDS_WITH_NO = ("save_strategy", "logging_strategy", "eval_strategy")
"""Fields of `training` whose values are words, one of which is `no`."""
MOST_LAYERS = 100
"""The most files that may extend each other."""
EXPECTED = {
    "model_type": "should be a section of keys",
    "dict_type": "should be a section of keys",
    "list_type": "should be a list",
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_pattern_mismatch": "should be letters, digits and any of . _ + -, the first a letter or digit",
    "too_short": "should have at least one entry",
}
"""pydantic's commonest types of error, in words for users. Other types keep pydantic's own message."""


def load_config(path: str | Path, overrides: Sequence[str] = (), of_run: bool = False) -> StreamConfig:
    """Read a run's YAML file, or the shipped one of that name, and apply `key.path=value` overrides (values are YAML).

    `tasks.pathvqa.epochs=1` changes one task, `tasks.*.epochs=1` all of them; `tasks=[pathvqa,derm]` keeps only these.

    Args:
        path: The file, or the name of a shipped one.
        overrides: Applied in order; a later one of the same key wins.
        of_run: The file comes from a run folder, so it may not name a method to import (`trust`).

    Raises:
        ConfigError: Unreadable file, unsafe YAML, unknown key (with the nearest known one), wrong type, repeated or
            unknown task, or bad override.
    """
    files = layers(path)
    raw = _merge({"datasets": copy.deepcopy(_catalogued_datasets())}, _merged(files))
    for override in overrides:
        _apply_override(raw, override)
    check_values(raw)
    note_consent(raw, files, overrides, of_run)
    try:
        return StreamConfig.model_validate(raw)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(item, raw) for item in error.errors())) from None


@cache
def _catalogued_datasets() -> dict[str, Any]:
    """Return the folder and modality of the published data sets, from the package's catalogue."""
    entries = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    fields = ("modality", "folder", "image_folders")
    return {name: {**{key: entry[key] for key in fields}, "published": name} for name, entry in entries.items()}


def layers(given: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the content of a file, of the file that its `extends` names (relative to itself, or shipped), and so on.

    Raises:
        ConfigError: A file cannot be read, is no mapping, or extends itself; or the files are too many or too large.
    """
    files: list[tuple[Path, dict[str, Any]]] = []
    path, size = find_config(given), 0
    read: set[Path] = set()
    while True:
        if path.resolve() in read:
            raise ConfigError(f"{path}: `extends` leads back to this file")
        if len(files) == MOST_LAYERS:
            raise ConfigError(f"{path}: {given} extends more than {MOST_LAYERS} files; merge some of them")
        read.add(path.resolve())
        content = _read_mapping(path)
        size += path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{path}: {given} and what it extends have more than {MOST_BYTES:,} bytes; shorten them")
        parent = content.pop("extends", None)
        files.append((path, content))
        if parent is None:
            return files
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: `extends` must name one file")
        path = find_config(parent, path.parent)


def read_layers(given: str | Path) -> dict[str, Any]:
    """Merge a file with those that it extends, checking only that they are plain YAML."""
    return _merged(layers(given))


def _merged(files: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for _, content in reversed(files):
        merged = _merge(merged, content)
    return merged


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        loaded = read_plain_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not plain YAML: {error}") from None
    if loaded is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(loaded).__name__}")
    return loaded


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `above` over `below`: mappings are merged key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {shorten(override)} is not of the form key.path=value")
    try:
        value = plain_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {shorten(override)}: the value is not plain YAML: {error}") from None
    if key == "tasks" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        raw["tasks"] = [_task_named(raw, name) for name in value]
        return
    *parents, last = key.split(".")
    if parents == ["tasks"]:
        raise ConfigError(f"override {shorten(override)}: name a key of the task too, as in tasks.{last}.epochs=1")
    for target in _targets(raw, parents, override):
        target[last] = value


def _targets(raw: dict[str, Any], parents: list[str], override: str) -> list[dict[str, Any]]:
    """Return the mappings that an override's path leads to. Missing ones are created, so that validation names them."""
    if parents[:1] == ["tasks"] and len(parents) == 2:
        return _tasks(raw) if parents[1] == "*" else [_task_named(raw, parents[1])]
    node = raw
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {shorten(override)}: {part!r} has a value, not further keys")
    return [node]


def _tasks(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries under `tasks` in a file that is not validated yet."""
    tasks = raw.get("tasks")
    return [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []


def _task_named(raw: dict[str, Any], name: str) -> dict[str, Any]:
    tasks = {task["name"]: task for task in _tasks(raw) if isinstance(task.get("name"), str)}
    if name not in tasks:
        raise ConfigError(f"unknown task {name!r}{nearest(name, tasks)}")
    return tasks[name]


def _explain(item: Any, raw: Mapping[str, Any]) -> str:
    """Describe one validation error in a line: where, what, and the nearest known key. Tasks are named, not
    numbered."""
    location = [str(part) for part in item["loc"] if part != "[key]"]  # pydantic marks a wrong key in this way.
    valid = _known_keys(location[:-1], raw) if item["type"] == "extra_forbidden" else []
    named = location.copy()
    if location[:1] == ["method_section"]:
        named[0] = _method_name(raw)
    if location[:1] == ["tasks"] and len(location) > 2:
        name = raw["tasks"][int(location[1])].get("name")
        named[1] = name if isinstance(name, str) else location[1]
    where = visible(".".join(named))[:200]
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(location[-1], valid)}"
    if item["type"] == "missing":
        return f"{where}: required, but not given"
    message = _fault(item)
    return f"{where}: {message}" if where else message


def _fault(item: Any) -> str:
    """Describe the error of a value, with the value shortened."""
    if item["type"] == "value_error":  # Our own messages, and those of libraries, say everything.
        return item["msg"].removeprefix("Value error, ")
    value = item["input"]
    message = EXPECTED.get(item["type"].replace("parsing", "type")) or item["msg"].removeprefix("Input ")
    if isinstance(value, bool) and item["type"] in ("string_type", "literal_error", "enum"):
        word = "yes" if value else "no"
        return (
            f"{message}, found {str(value).lower()}: YAML reads a bare {word}, {'on' if value else 'off'} or "
            f"{str(value).lower()} as that; to mean the word, quote it, on the command line as '\"{word}\"'"
        )
    if item["type"] == "string_type" and not isinstance(value, list | dict | None):
        return f"{message}, found {reprlib.repr(value)}; quote it, on the command line as '\"{reprlib.repr(value)}\"'"
    return f"{message}, found {reprlib.repr(value)}"


def _method_name(raw: Mapping[str, Any]) -> str:
    """Return the name of the chosen method, for messages."""
    method = if_trusted(raw.get("method", StreamConfig.model_fields["method"].default))
    return method.name if method else "method_section"


def _known_keys(location: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    if location == ["method_section"]:
        method = if_trusted(raw.get("method", StreamConfig.model_fields["method"].default))
        return list(method.section.model_fields) if method and method.section else []
    model: Any = StreamConfig
    for part in location:
        if part.isdigit() or model is DatasetConfig:
            continue
        nested = {"tasks": TaskConfig, "datasets": DatasetConfig}
        field = model.model_fields.get(part)
        model = nested.get(part) or (field.annotation if field else model)
    return [name for name in model.model_fields if name != "method_section"]


def training_fields(config: StreamConfig) -> dict[str, Any]:
    """Return the `training` section, checked against the installed transformers' TrainingArguments.

    Raises:
        ConfigError: A field does not exist, is in `DERIVED_TRAINING_FIELDS`, or has the wrong type or value.
    """
    import dataclasses
    from typing import get_type_hints

    from pydantic import NonNegativeInt, StrictBool, TypeAdapter
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} | set(OWN_TRAINING_FIELDS)
    hints = {
        **get_type_hints(TrainingArguments),
        **OWN_TRAINING_FIELDS,
        "gradient_checkpointing": StrictBool | NonNegativeInt | Literal["auto"],
    }
    checked = {}
    for key, value in config.training.items():
        if key in DERIVED_TRAINING_FIELDS:
            raise ConfigError(f"training.{key} cannot be set: {DERIVED_TRAINING_FIELDS[key]}")
        if key not in names:
            raise ConfigError(f"training.{key}: unknown key{nearest(key, names - set(DERIVED_TRAINING_FIELDS))}")
        if value is False and key in WORDS_WITH_NO:
            value = "no"  # YAML turns a bare no, as transformers' documentation spells it, into false.
        if key == "lr_scheduler_kwargs" and isinstance(value, Mapping):
            value = {name: as_number(setting) for name, setting in value.items()}
        adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
        try:
            checked[key] = adapter.validate_python(as_number(value) if _wants_number(hints[key]) else value)
        except ValidationError as error:
            if key == "gradient_checkpointing":
                expected = "should be true, false, auto, or how many layers"
                raise ConfigError(f"training.{key}: {expected}, found {value!r}") from None
            raise ConfigError(f"training.{key}: {_fault(error.errors()[0])}") from None
        if key == "deepspeed" and isinstance(checked[key], str):
            checked[key] = str(find_deepspeed(checked[key]))
        if key == "save_strategy" and checked[key] not in SAVE_STRATEGIES:
            raise ConfigError(f"training.save_strategy is {value!r}; choose one of {', '.join(SAVE_STRATEGIES)}")
        if key == "save_total_limit" and (checked[key] is None or checked[key] < 1):
            raise ConfigError(
                f"training.save_total_limit is {value!r}: give the number of checkpoints to keep, at least 1"
            )
        if isinstance(checked[key], float) and not math.isfinite(checked[key]):
            raise ConfigError(f"training.{key}: should be a finite number, found {value!r}")
    return checked | validation_fields(config, checked)


def _wants_number(hint: Any) -> bool:
    return float in (hint, *getattr(hint, "__args__", ()))
