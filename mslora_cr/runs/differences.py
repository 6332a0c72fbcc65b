"""Compares a run folder with a configuration: former defaults, and settings in which its finished tasks differ."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mslora_cr.banks.io import CONFIG as ADAPTER_CONFIG
from mslora_cr.banks.io import METADATA
from mslora_cr.config.methods import load_method
from mslora_cr.config.plain_yaml import read_plain_yaml
from mslora_cr.config.run_files import CONFIG
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.runs.entries import RunLedger
from mslora_cr.utils.strict_json import JsonError, read_object

log = logging.getLogger(__name__)
MOST_NAMED = 6
"""The most changed settings that a refusal names."""


def with_former_defaults(config: StreamConfig) -> StreamConfig:
    """Return the configuration with which a run folder continues.

    A method's defaults may have changed since the folder was begun (`Method.former_defaults`). The old ones hold there
    as long as the configuration sets none of them.
    """
    settings = config.method_section
    former = load_method(config.method).former_defaults if config.knows_method else {}
    if settings is None or not former or settings.model_fields_set & former.keys():
        return config
    name = load_method(config.method).name
    try:
        begun = read_plain_yaml(config.run_dir / CONFIG)[name]
        if any(begun.get(key) != value for key, value in former.items()):
            return config
    # There is none yet, or it is no configuration of this method.
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return config
    values = {key: value for key, value in former.items() if value is not None}
    assignments = ", ".join(f"{name}.{key}={value}" for key, value in values.items())
    log.warning("%s continues with %s, as it began; a new run has another default", config.run_dir, assignments)
    section = type(settings).model_validate({**settings.model_dump(exclude=set(former)), **values})
    return config.model_copy(update={"method_section": section})


@dataclass(frozen=True)
class Finished:
    """The finished tasks of a run folder."""

    folder: Path
    ledger: RunLedger

    def fixed_difference(self, config: StreamConfig) -> str:
        """Return the first difference in what a finished task cannot change: its position in the stream, its method,
        its rank; empty if there is none."""
        stream = {task.name: task for task in config.stream}
        finished = self.ledger.tasks
        gone = next((name for name in finished if name not in stream), None)
        if gone is not None:
            return f"{gone!r} is finished there, and not a task here"
        for name, entry in finished.items():
            method = entry.method or self.ledger.method
            if method != config.method:
                return f"method: {method} there, {config.method} here"
            rank = entry.rank or self._of_bank(name, ADAPTER_CONFIG, "r")
            if rank not in (None, config.lora.rank):
                return f"lora.rank: {rank} there, {config.lora.rank} here"
        entries = {
            name: len(entry.stream) - 1 if entry.stream else self._of_bank(name, METADATA, "index")
            for name, entry in finished.items()
        }
        positions = {name: position for name, position in entries.items() if isinstance(position, int)}
        moved = next((name for name, position in positions.items() if position != stream[name].index), None)
        if moved is None:
            return ""
        there = sorted(positions, key=lambda name: positions[name])
        here = sorted(positions, key=lambda name: stream[name].index)
        if there == here:
            return f"order: {moved!r} is task {positions[moved] + 1} there, task {stream[moved].index + 1} here"
        return f"order: {', '.join(there)} there; {', '.join(here)} here"

    def _of_bank(self, task: str, file: str, key: str) -> Any:
        """Return the value in a bank's file, for ledgers of version 0.1.0, which lack it."""
        try:
            return read_object(self.folder / "banks" / task / file).get(key)
        except JsonError:
            return None

    def difference(self, config: StreamConfig) -> str:
        """Return the settings in which the finished tasks differ; empty if there are none.

        Raises:
            KeyError: A finished task is not in the stream; `fixed_difference` finds that.
        """
        # The last task's configuration includes those of the earlier ones.
        for name, entry in reversed(self.ledger.tasks.items()):
            task = config.task(name)
            if entry.config_digest in (None, config.training_digest(task)):
                continue
            changed = changed_settings(self.folder, config, task)
            if not changed:  # A launch with --force has overwritten config.yaml.
                forced = [change for launch in self.ledger.forced for change in launch.changed]
                changed = [f"{name!r} was trained with other settings, by --force", *forced]
            return "; ".join(changed[:MOST_NAMED])
        return ""


def changed_settings(folder: Path, config: StreamConfig, task: Task) -> list[str]:
    """Return the settings that decide a task's bank and differ from the run folder's saved configuration: `key: old
    there, new here`, the order of tasks first."""
    try:
        saved = StreamConfig.model_validate(read_plain_yaml(folder / CONFIG))
        last = saved.stream[task.index] if task.index < len(saved.stream) else None
        old = saved.fingerprint_fields(last)
    except (OSError, ValueError):
        return [f"its {CONFIG} is missing or damaged"]
    new = config.fingerprint_fields(task)
    changes = []
    orders = [[member["name"] for member in fields["tasks"]] for fields in (old, new)]
    if orders[0] != orders[1]:
        changes.append(f"order: {', '.join(orders[0])} there; {', '.join(orders[1])} here")
    before, now = _flat(old), _flat(new)
    for key in {**before, **now}:
        both = key in before and key in now
        if before.get(key) != now.get(key) and (both or not changes):
            changes.append(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here")
    return changes


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
    if isinstance(node, list):
        named = [
            (item.get("name", index) if isinstance(item, dict) else index, item) for index, item in enumerate(node)
        ]
        return {key: value for name, child in named for key, value in _flat(child, f"{prefix}{name}.").items()}
    return {prefix[:-1]: node}
