"""Shows a release on the console, and writes it as a Markdown record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from mslora_cr.config.schema import StreamConfig
from mslora_cr.release.gate_test import GateTest
from mslora_cr.release.records import ReleaseRecord, record_path
from mslora_cr.reporting.render import render


def release_table(record: ReleaseRecord) -> str:
    """Return the record's verdict, its tests and its reasons."""
    lines = [f"record {record.number} of {record.run}, stage {record.stage}: {record.verdict.upper()}"]
    if record.kind == "rollback":
        return f"{lines[0]} (a rollback to release {record.serves})"
    headers = ["", "name", "score", "before", "change", "bound", "required", "p", "patients", "outcome"]
    lines.append(tabulate([_row(test) for test in record.tests], headers, disable_numparse=True))
    lines.append(
        f"One-sided tests at level {record.level:.4f}, candidate {record.candidate} of the stream; all must pass."
    )
    return "\n".join([*lines, *(f"- {reason}" for reason in record.reasons)])


def chain_table(records: Sequence[ReleaseRecord]) -> str:
    """Return a line for each record; the live release is marked."""
    if not records:
        return "no record yet; `mslora-cr release PLAN RUN` makes the first"
    serving = records[-1].serves
    rows = [
        [one.number, "live" if one.number == serving else "", one.kind, one.verdict, one.stage, one.when, one.by]
        for one in records
    ]
    return tabulate(rows, ["record", "", "kind", "verdict", "stage", "when", "by"], disable_numparse=True)


def write_release(record: ReleaseRecord, config: StreamConfig) -> Path:
    """Write the record's Markdown beside it, and return the file."""
    path = record_path(config.run_dir, record.number).with_suffix(".md")
    names = ", ".join(f"{task.name} ({task.modality})" for task in config.stream[: record.stage])
    render("release.md", path, {"record": record, "config": config, "tasks": names, "rows": map(_row, record.tests)})
    return path


def _row(test: GateTest) -> list[str]:
    if test.what in ("calibration", "foreign questions"):  # The bound is an upper one, of a value below a limit.
        limit = test.score + test.difference
        figures = [f"{test.score:.1f}", "", "", f"{limit - test.bound:.2f}", f"< {limit:.1f}"]
    else:
        before = "" if test.reference is None else f"{test.reference:.1f}"
        bound = f"{test.bound:+.2f}"
        figures = [f"{test.score:.1f}", before, f"{test.difference:+.2f}", bound, f"> {test.required:+.1f}"]
    return [test.what, test.name, *figures, f"{test.p:.4f}", f"{test.groups:,}", test.outcome]
