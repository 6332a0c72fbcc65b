"""Forgetting on a held-out data set, which is answered at every stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.data.image_digests import images_digest
from mslora_cr.data.tasks import images_shown, test_records
from mslora_cr.distributed.comm import barrier, rank
from mslora_cr.evaluation.answer_files import Origin
from mslora_cr.evaluation.cells import PlannedCell
from mslora_cr.evaluation.evaluate import answer_cell
from mslora_cr.evaluation.probe_result import MEASURED, PROBE, Loss, Probe
from mslora_cr.evaluation.results import Cell, column_of
from mslora_cr.evaluation.schemas import PairedNote
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.evaluation.session import EvaluationSession
from mslora_cr.methods.base import method_of
from mslora_cr.metrics.published import Scores
from mslora_cr.runs.environment import check_hosts, environment
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.runs.lock import launch
from mslora_cr.statistics.matrix_intervals import Column, is_binary
from mslora_cr.statistics.paired import paired_change, paired_task
from mslora_cr.utils.errors import nearest


def evaluate_probe(config: StreamConfig, dataset: str, banks: Mapping[str, Bank] | None = None) -> Path:
    """Answer a data set that no task of the stream trains, with the base model and after every learned stage; return
    the path of `probe.json`.

    Its questions belong to no task. At each stage, the banks that answer the task learned there answer them.

    Args:
        dataset: A name in `datasets` that is not in `tasks`.
        banks: As for `evaluate`.

    Raises:
        ConfigError: There is no such data set, a task trains it, or a router would have to find the task of a question.
        DataError, ModelError, BankError, LockedError: As `evaluate`.
    """
    task = check_held_out(config, dataset)
    with launch(config, config.results_run_dir):
        by_task = dict(banks) if banks is not None else finished_banks(config)
        by_number = {one.index + 1: by_task[one.name] for one in config.stream if one.name in by_task}
        records = test_records(config, task)
        wanted = _cells(config, task, by_number)
        banks_of = {cell.stage: [by_number[number] for number in cell.banks] for cell in wanted}
        learned = list(by_number.values())
        session = EvaluationSession(config, learned, {task.name: records}, cached_images=True, switches=True)
        images = images_digest(images_shown(config, task, records))
        origins = {
            stage: Origin(session.fingerprint(answering, questions=records.digest, fold=config.lora.fold), images)
            for stage, answering in banks_of.items()
        }
        facts = {
            f"the questions, banks or settings of {task.name} at stage {stage}": origin
            for stage, origin in origins.items()
        }
        check_hosts(config.results_run_dir, facts)
        scored: dict[Path, Scores] = {}
        rows = [answer_cell(session, cell, banks_of[cell.stage], origins[cell.stage], scored) for cell in wanted]
        path = config.results_run_dir / PROBE / task.name / f"{PROBE}.json"
        if rank() == 0:
            cells = tuple(row for row in rows if row is not None)
            Probe(
                run=config.run,
                method=config.method,
                banks_by=config.evaluation.banks_by,
                dataset=task.name,
                cells=cells,
                losses=tuple(_losses(config.results_run_dir, cells)),
                environment=environment(),
            ).write(path)
        barrier()
        return path


def check_held_out(config: StreamConfig, dataset: str) -> Task:
    """Return the data set, as if it were a task after the stream.

    Raises:
        ConfigError: As `evaluate_probe`.
    """
    if config.evaluation.banks_by == "routed":
        raise ConfigError("--probe: questions of no task cannot be routed; use --banks-by prefix or all")
    if dataset not in config.datasets:
        raise ConfigError(f"--probe: unknown data set {dataset!r}{nearest(dataset, config.datasets)}")
    if dataset in [task.name for task in config.tasks]:
        raise ConfigError(f"--probe: {dataset} is a task of this stream; name a data set that none of them trains")
    settings = config.datasets[dataset].model_dump(exclude={"published"})
    # Training would need these values; they are never read.
    return Task(index=len(config.tasks), name=dataset, epochs=1.0, batch_size=1, learning_rate=1.0, **settings)


def _cells(config: StreamConfig, task: Task, learned: Mapping[int, Bank]) -> list[PlannedCell]:
    """Return the base model and every stage that can answer. Stages that the same banks answer share one folder."""
    method, folder = method_of(config), config.results_run_dir / PROBE / task.name
    folders: dict[tuple[int, ...], Path] = {}
    planned = []
    for stage in (0, *method.stages(sorted(learned), len(config.tasks))):
        banks = tuple(method.banks(stage, stage, config.evaluation.banks_by)) if stage else ()
        if set(banks) <= set(learned):
            planned.append(PlannedCell(task, stage, banks, folders.setdefault(banks, folder / f"stage-{stage}")))
    return planned


def _losses(root: Path, cells: tuple[Cell, ...]) -> list[Loss]:
    base, *later = cells
    before = _columns(root, base)
    losses = []
    for cell in later:
        after = _columns(root, cell)
        for metric in [metric for metric in MEASURED if metric in cell.metrics]:
            lost = before[metric].scores - after[metric].scores
            binary = is_binary(before[metric].scores) and is_binary(after[metric].scores)
            same = cell.answers == base.answers
            change = paired_change([paired_task(lost, before[metric].groups, binary, same)])
            scores = base.metrics[metric], cell.metrics[metric]
            losses.append(
                Loss(
                    stage=cell.stage,
                    metric=metric,
                    base=scores[0],
                    score=scores[1],
                    loss=scores[0] - scores[1],
                    interval=change.ends,
                    changed=change.gained + change.lost,
                    questions=change.questions,
                    change=PairedNote.of(change),
                )
            )
    return losses


def _columns(root: Path, cell: Cell) -> dict[str, Column]:
    table = read_scores((root / cell.answers).with_name(SCORES))
    return {metric: column_of(table, metric) for metric in MEASURED}
