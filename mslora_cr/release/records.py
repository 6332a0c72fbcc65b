"""The releases of a run: records on disk, each chained to the one before by its digest."""

from __future__ import annotations

import getpass
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mslora_cr.config.run_files import BANK_WEIGHTS
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.tasks import test_records
from mslora_cr.evaluation.results import required_evaluation
from mslora_cr.evaluation.schemas import ROUTED
from mslora_cr.release.gate import gate_tests, verdict_of
from mslora_cr.release.gate_test import GateTest, Verdict
from mslora_cr.release.plan import read_plan, registration_of
from mslora_cr.runs.environment import environment
from mslora_cr.runs.ledger import Ledger
from mslora_cr.runs.lock import one_writer
from mslora_cr.statistics.noninferiority import spent
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import file_digest
from mslora_cr.utils.state import StateFile

RELEASES = "releases"
"""The folder of the records in a run folder."""


class ReleaseError(UserError):
    """A release cannot be made, or the chain of releases is broken."""


class ReleaseRecord(StateFile):
    """`releases/NNNN.json`: a decision about an update, or a rollback.

    Attributes:
        number: The record's number in the chain, from 1.
        previous: The digest of the record before; None for the first.
        digest: SHA-256 of this record's content without this field.
        kind: `gate`, or `rollback` to an earlier release.
        verdict: What the gate said; of a rollback `release`.
        serves: The number of the record whose banks are live after this one; None where no update was released yet.
        when: UTC time, ISO 8601.
        by: Who ran the command.
        stage: The stage that was judged, or that a rollback returns to.
        reasons: Why it is no release, in words.
        plan: The plan's text; empty for a rollback.
        plan_digest: SHA-256 of the plan's file.
        registered: When the plan was registered.
        level: The level of this candidate's tests.
        candidate: Its number among the candidates of this stream, from 1.
        tests: The figures.
        banks: SHA-256 of each bank's weights, by task.
        base: SHA-256 that tells the base model from another.
        data: SHA-256 of each task's test file.
        training_data: SHA-256 of each task's training records.
        environment: Versions, commit and hardware.
    """

    MEND: ClassVar[str] = "restore it from a copy; a chain of releases is never written anew"

    number: int = Field(ge=1)
    previous: str | None
    digest: str = ""
    kind: Literal["gate", "rollback"]
    verdict: Verdict
    serves: int | None
    when: str
    by: str
    run: str
    stage: int = Field(ge=1)
    reasons: tuple[str, ...] = ()
    plan: str = ""
    plan_digest: str | None = None
    registered: str | None = None
    level: float | None = None
    candidate: int | None = None
    tests: tuple[GateTest, ...] = ()
    banks: dict[str, str]
    base: str | None
    data: dict[str, str] = Field(default_factory=dict)
    training_data: dict[str, str | None] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)


def records_of(run_folder: Path) -> list[ReleaseRecord]:
    """Read the records of a run in their order, and check the chain.

    Raises:
        ReleaseError: A record is missing or was changed.
        StateError: A record cannot be read.
    """
    records, previous = [], None
    paths = sorted((run_folder / RELEASES).glob("[0-9]*.json"))
    for number, path in enumerate(paths, 1):
        if path.name != record_path(run_folder, number).name:
            raise ReleaseError(f"{record_path(run_folder, number)} is missing; restore it from a copy")
        record = ReleaseRecord.read(path)
        if (record.number, record.previous) != (number, previous):
            raise ReleaseError(f"{path} does not continue the record before it: one of the two was replaced")
        if _digest(record) != record.digest:
            raise ReleaseError(f"{path} was changed since it was written; restore it from a copy")
        previous = record.digest
        records.append(record)
    return records


def record_path(run_folder: Path, number: int) -> Path:
    return run_folder / RELEASES / f"{number:04d}.json"


def decide(plan_path: Path, config: StreamConfig) -> ReleaseRecord:
    """Judge a run's newest stage by a plan and append the record; a candidate that was judged keeps its record.

    Raises:
        ReleaseError: The plan was not registered, or the chain is broken.
        ConfigError: The plan is wrong.
        ReportError: The run is not evaluated as the plan needs it.
    """
    with one_writer(config.run_dir):
        ledger = Ledger.read(config)
        plan = read_plan(plan_path, [task.name for task in config.stream])
        registration = registration_of(plan_path, ledger)
        if registration is None:
            raise ReleaseError(
                f"{plan_path} is not registered for {config.run_dir}, or was changed since; before the next task is "
                f"trained, run `mslora-cr release register {plan_path} {config.run_dir}`"
            )
        records = records_of(config.run_dir)
        results = config.results_run_dir / ROUTED if plan.routed else config.results_run_dir
        evaluation = required_evaluation(results)
        banks = _banks(ledger, evaluation.tasks)
        for record in records:
            if record.kind == "gate" and (record.banks, record.plan_digest) == (banks, registration.digest):
                return record
        candidate = 1 + sum(record.kind == "gate" for record in records)
        tests = gate_tests(
            plan,
            config.results_run_dir,
            spent(plan.level, candidate),
            lambda task: test_records(config, config.task(task)),
        )
        verdict = verdict_of(tests)
        reasons = [f"{test.name}: {test.reason}" for test in tests if test.outcome in ("hold", "fail")]
        if evaluation.tasks[-1] in registration.finished:
            verdict = "hold" if verdict == "release" else verdict
            reasons.append(f"the plan was registered {registration.when}, after {evaluation.tasks[-1]} was trained")
        return _append(
            config.run_dir,
            records,
            ReleaseRecord(
                **_head(records, config),
                kind="gate",
                verdict=verdict,
                serves=len(records) + 1 if verdict == "release" else _serving(records),
                stage=len(evaluation.tasks),
                reasons=tuple(reasons),
                plan=registration.text,
                plan_digest=registration.digest,
                registered=registration.when,
                level=spent(plan.level, candidate),
                candidate=candidate,
                tests=tuple(tests),
                banks=banks,
                base=ledger.tasks[evaluation.tasks[-1]].model_digest,
                data={cell.task: cell.questions for cell in evaluation.cells},
                training_data={name: ledger.tasks[name].records_digest for name in evaluation.tasks},
                environment=environment(),
            ),
        )


def rollback(config: StreamConfig, number: int) -> ReleaseRecord:
    """Make an earlier release the live one again, by a new record.

    Raises:
        ReleaseError: There is no such release, its banks are gone, or it is live already.
    """
    with one_writer(config.run_dir):
        records = records_of(config.run_dir)
        target = released(config, number)
        if _serving(records) == number:
            raise ReleaseError(f"release {number} of {config.run} is live already")
        return _append(
            config.run_dir,
            records,
            ReleaseRecord(
                **_head(records, config),
                kind="rollback",
                verdict="release",
                serves=number,
                stage=target.stage,
                banks=target.banks,
                base=target.base,
            ),
        )


def released(config: StreamConfig, number: int) -> ReleaseRecord:
    """Return the record of a release whose banks are still those that were judged.

    Raises:
        ReleaseError: There is no such release, or a bank has changed since.
    """
    records = records_of(config.run_dir)
    record = records[number - 1] if 0 < number <= len(records) else None
    if record is None or record.kind != "gate" or record.verdict != "release":
        there = ", ".join(str(one.number) for one in records if one.kind == "gate" and one.verdict == "release")
        raise ReleaseError(f"{config.run} has no release {number}; there are {there or 'none'}")
    ledger = Ledger.read(config)
    for task, digest in record.banks.items():
        file = ledger.bank_folder(task) / BANK_WEIGHTS
        if not file.is_file() or file_digest(file) != digest:
            raise ReleaseError(f"{file} is not the bank of release {number}; restore it, or release anew")
    return record


def serving(config: StreamConfig) -> int | None:
    """Return the number of the live release; None where there is none."""
    return _serving(records_of(config.run_dir))


def _serving(records: Sequence[ReleaseRecord]) -> int | None:
    return records[-1].serves if records else None


def _head(records: Sequence[ReleaseRecord], config: StreamConfig) -> dict[str, Any]:
    return {
        "number": len(records) + 1,
        "previous": records[-1].digest if records else None,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": getpass.getuser(),
        "run": config.run,
    }


def _banks(ledger: Ledger, tasks: Sequence[str]) -> dict[str, str]:
    missing = [task for task in tasks if task not in ledger.tasks]
    if missing:
        raise ConfigError(f"{ledger.folder} has no finished bank of {', '.join(missing)}; train the run to its end")
    return {task: ledger.tasks[task].digest for task in tasks}


def _append(run_folder: Path, records: Sequence[ReleaseRecord], record: ReleaseRecord) -> ReleaseRecord:
    path = record_path(run_folder, len(records) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = record.model_copy(update={"digest": _digest(record)})
    whole.write(path)
    return whole


def _digest(record: ReleaseRecord) -> str:
    content = record.model_dump(mode="json", exclude={"digest", "version"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
