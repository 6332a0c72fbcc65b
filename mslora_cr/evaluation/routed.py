"""Task-agnostic answers: questions of all tasks mixed, each answered by the banks of the task that the router predicts.

Everything goes to `routed/` in the results folder, beside the task-aware answers. Further passes (`Asking`) go to
folders below it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.per_sample import whole_banks
from mslora_cr.clinical.calibrated import stored_temperature
from mslora_cr.clinical.training import task_frequencies
from mslora_cr.config.schema import ConfigError, StreamConfig, Task
from mslora_cr.data.records import TestRecords
from mslora_cr.data.tasks import task_image_roots
from mslora_cr.distributed.comm import all_gather_object, barrier, rank, world_size
from mslora_cr.evaluation.answer_files import Origin, answer_once, fingerprint_of, read_stamp, write_stamp
from mslora_cr.evaluation.asking import AS_IT_IS, Asking, asked_records, write_blank
from mslora_cr.evaluation.cells import CellKey, Stages, stages_of
from mslora_cr.evaluation.doubts import warn_of_doubts
from mslora_cr.evaluation.probabilities import PROBABILITIES
from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.schemas import ANSWERS, ROUTED, ROUTING, HeldOutTask, Routing, StageRouting
from mslora_cr.evaluation.score import group_numbers, question_groups, score_file
from mslora_cr.evaluation.session import EvaluationSession
from mslora_cr.evaluation.summary import ImageDigests, ResultsTarget, cell_row, question_digests, write_summary
from mslora_cr.methods.base import method_of, needs_task
from mslora_cr.routing.fit import feature_extractor
from mslora_cr.routing.foreign import BOTH
from mslora_cr.routing.foreign_questions import ForeignQuestions
from mslora_cr.routing.lda import TaskRouter, TaskStatistics
from mslora_cr.runs.environment import check_hosts
from mslora_cr.runs.ledger import Ledger, finished_banks
from mslora_cr.runs.lock import launch
from mslora_cr.statistics.intervals import estimate, percent, score_interval
from mslora_cr.utils.files import replacing, write_text
from mslora_cr.utils.regular import check_regular


def evaluate_routed(
    config: StreamConfig,
    stages: Stages = "final",
    banks: Mapping[str, Bank] | None = None,
    asking: Asking = AS_IT_IS,
) -> Path:
    """Answer and score the questions of every learned task, without giving the task.

    Below `routed/` of the results folder it writes answers and scores by task, `evaluation.json`, and `routing.json`
    with the router's confusion matrix at every stage.

    Args:
        banks: The banks by task, if they do not come from the run folder's ledger.
        asking: How questions are put. Tasks that have no such questions are left out. Where a grey picture is shown,
            the banks are those that the true picture is routed to.

    Raises:
        ConfigError: The method answers every task with the same banks, or `stages` is `own`, where nothing is mixed.
        DataError, ModelError, BankError, LockedError: Before anything is answered.
    """
    if not needs_task(config):
        raise ConfigError(
            f"method {config.method} answers every task with the same banks, so routing changes nothing; "
            "use evaluation.banks_by=prefix"
        )
    if stages == "own":
        raise ConfigError("routed questions of all tasks are answered together; use --stages final, seen or all")
    with launch(config, config.results_run_dir):
        by_task = dict(banks) if banks is not None else finished_banks(config)
        learned = [task for task in config.stream if task.name in by_task]
        return _answer_stages(config, by_task, learned, _tasks_at(config, stages, learned, asking), asking)


def _tasks_at(config: StreamConfig, stages: Stages, learned: Sequence[Task], asking: Asking) -> dict[int, list[Task]]:
    """Return the tasks that are answered, by stage."""
    asked = asking.tasks(config, config.stream)
    tasks_at = {
        stage: [task for task in asked if stage in stages_of(task, stages, config)]
        for stage in range(1, len(config.tasks) + 1)
        if len(learned) >= stage and learned[stage - 1].index == stage - 1  # No earlier bank is missing.
    }
    tasks_at = {stage: tasks for stage, tasks in tasks_at.items() if tasks}
    if not tasks_at:
        raise BankError(f"no stage of this run can be answered from the banks in {config.run_dir}")
    return tasks_at


def _answer_stages(
    config: StreamConfig,
    by_task: Mapping[str, Bank],
    learned: Sequence[Task],
    tasks_at: Mapping[int, Sequence[Task]],
    asking: Asking,
) -> Path:
    """Answer and score the stages; return the path of `evaluation.json`."""
    names = {task.name for tasks in tasks_at.values() for task in tasks}
    records = asked_records(asking.config(config), map(config.task, sorted(names)), asking)
    ledger = Ledger.read(config)
    statistics = [ledger.statistics(task.name) for task in learned[: max(tasks_at)]]
    routed = _Routed(config, by_task, statistics, records, asking)
    facts = {
        f"the questions, banks or settings at stage {stage}": routed.origin(stage, tasks)
        for stage, tasks in tasks_at.items()
    }
    check_hosts(routed.folder, facts)
    rows: dict[CellKey, Cell] = {}
    for stage, tasks in tasks_at.items():
        rows |= routed.answer(stage, tasks)
    folder = routed.folder
    target = ResultsTarget.of_run(config, folder)
    if rank() == 0:
        order = [(task.name, stage) for task in config.stream for stage in tasks_at if (task.name, stage) in rows]
        cells = write_summary(config, target, [rows[key] for key in order], routed.possible(folder))
        ways = {cell.stage: cell.fingerprint for cell in cells.cells}
        stamps = (read_stamp(folder / f"stage-{stage}", ways[stage]) for stage in cells.stages)
        routings = tuple(stamp.routing for stamp in stamps if stamp and stamp.routing)
        Routing(stages=routings).write(folder / ROUTING)
    barrier()
    return target.path


class _Routed:
    """The questions of a run, and the tasks that the router predicts for them."""

    def __init__(
        self,
        config: StreamConfig,
        banks: Mapping[str, Bank],
        statistics: Sequence[TaskStatistics],
        records: Mapping[str, TestRecords],
        asking: Asking,
    ) -> None:
        """
        Args:
            statistics: Those of the tasks whose banks answer.
        """
        self.config, self._asking = config, asking
        self.folder = config.results_run_dir / ROUTED / asking.name
        self.banks = [banks[task.name] for task in config.stream[: len(statistics)]]
        self.statistics = statistics
        blank = self.folder if asking.blank else None
        if blank is not None:
            write_blank(blank)
        self._session = EvaluationSession(config, self.banks, records, blank=blank)
        self._records = records
        self._question_digests = question_digests(asking.config(config), records, asking.path)
        self._image_digests = ImageDigests(config, records)
        self._routers = list(_router_digests(statistics))
        self._features: dict[str, Tensor] = {}

    def answer(self, stage: int, tasks: Sequence[Task]) -> dict[CellKey, Cell]:
        """Answer and score these tasks' questions after a stage, unless that was done before.

        Returns:
            On the first rank, the rows of `evaluation.json` by task and stage. The stage's entry of `routing.json` is
            in its stamp.
        """
        root = self.folder
        together = root / f"stage-{stage}"
        origin = self.origin(stage, tasks)
        folders = {task.name: root / task.name / f"stage-{stage}" for task in tasks}
        counts = {folder: len(self._records[name]) for name, folder in folders.items()}
        stamp = answer_once(
            together,
            origin,
            sum(counts.values()),
            lambda: self._answer(stage, tasks, together, folders, origin),
            counts,
        )
        if rank() != 0:
            return {}
        names = [bank.name for bank in self.banks[:stage]]
        digests = [bank.digest for bank in self.banks[:stage]]
        rows = {}
        for task in tasks:
            scores = score_file(
                folders[task.name] / ANSWERS,
                folders[task.name],
                self._records[task.name],
                training=task_frequencies(self.config, task),
                temperature=stored_temperature(root, task.name, digests),
                model=Path(self.config.model.path),
            )
            rows[task.name, stage] = cell_row(
                task, stage, names, folders[task.name], root, stamp, self._records[task.name], scores
            )
            warn_of_doubts(rows[task.name, stage], self.config.evaluation.max_new_tokens)
        return rows

    def _answer(
        self, stage: int, tasks: Sequence[Task], together: Path, folders: Mapping[str, Path], origin: Origin
    ) -> dict[str, Any]:
        router = self._router(stage)
        routes = {task.name: router.route(self._features_of(task)).tolist() for task in tasks}
        mixes = method_of(self.config).mixes_banks
        banks, weights = self._mix(stage, tasks, router) if mixes else self._choose(stage, tasks, routes)
        label = f"{len(tasks)} tasks mixed, routed among {stage}"
        padding = self._session.answer_mixed(tasks, weights, together, origin, label, banks)
        if rank() == 0:
            self._part(tasks, together, folders, routes, origin.fingerprint)
        return {**padding, "routing": self._confusion(stage, tasks, routes)}

    def _part(
        self,
        tasks: Sequence[Task],
        together: Path,
        folders: Mapping[str, Path],
        routes: Mapping[str, Sequence[int]],
        fingerprint: str,
    ) -> None:
        """Give each task its share of the answers; each answer names the predicted task."""
        probabilities = together / PROBABILITIES
        rows = probabilities.read_text(encoding="utf-8").splitlines(keepends=True) if probabilities.is_file() else []
        with check_regular(together / ANSWERS).open(encoding="utf-8") as lines:
            for task in tasks:
                folder = folders[task.name]
                folder.mkdir(parents=True, exist_ok=True)
                of_task, rows = rows[: len(routes[task.name])], rows[len(routes[task.name]) :]
                (folder / PROBABILITIES).unlink(missing_ok=True)
                if of_task:
                    write_text(folder / PROBABILITIES, "".join(of_task))
                with replacing(folder / ANSWERS) as partial, partial.open("w", encoding="utf-8") as file:
                    for route in routes[task.name]:
                        answer = {**json.loads(next(lines)), "metadata": {"routed_to": self.banks[route].name}}
                        file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                write_stamp(folder, fingerprint, len(routes[task.name]))
        (together / ANSWERS).unlink()
        probabilities.unlink(missing_ok=True)

    def _confusion(self, stage: int, tasks: Sequence[Task], routes: Mapping[str, Sequence[int]]) -> StageRouting:
        """Return how many questions of each task the router assigned to each learned task, and how many of learned
        tasks correctly.
        """
        counts = {task.name: tuple(np.bincount(routes[task.name], minlength=stage).tolist()) for task in tasks}
        learned = [task for task in tasks if task.index < stage]
        right = np.array([float(route == task.index) for task in learned for route in routes[task.name]])
        groups = [f"{task.name}: {group}" for task in learned for _, group in question_groups(self._records[task.name])]
        flagged = self._foreign.flagged(stage, tasks)
        return StageRouting(
            stage=stage,
            learned=tuple(bank.name for bank in self.banks[:stage]),
            confusion=counts,
            questions=len(right),
            accuracy=100 * float(right.mean()) if learned else None,
            interval=percent(score_interval([estimate(right, group_numbers(groups))])) if learned else None,
            foreign=flagged.pop(BOTH, None),
            foreign_by_part=flagged,
            held_out={
                name: {part: HeldOutTask(**found._asdict()) for part, found in by_part.items()}
                for name, by_part in self._foreign.held_out(stage, tasks).items()
            },
        )

    @cached_property
    def _foreign(self) -> ForeignQuestions:
        pictures = feature_extractor(self.config, self._session.base).image_features
        return ForeignQuestions(self.statistics, pictures, self._features_of)

    def _router(self, stage: int) -> TaskRouter:
        pictures = feature_extractor(self.config, self._session.base).image_features
        return method_of(self.config).router(self.config, self.statistics[:stage], pictures)

    def _choose(
        self, stage: int, tasks: Sequence[Task], routes: Mapping[str, Sequence[int]]
    ) -> tuple[Sequence[Bank], Tensor]:
        """Give each question the banks of its predicted task. All banks are held, for all stages."""
        method = method_of(self.config)
        chosen = [[number - 1 for number in method.banks(route + 1, stage, "prefix")] for route in range(stage)]
        flat = [chosen[route] for task in tasks for route in routes[task.name]]
        return self.banks, whole_banks(flat, len(self.banks))

    def _mix(self, stage: int, tasks: Sequence[Task], router: TaskRouter) -> tuple[Sequence[Bank], Tensor]:
        """Give each question the banks of all tasks, weighed by its probabilities."""
        whole, shared = method_of(self.config).mixed(self.config, self.banks[:stage])
        shares = torch.cat([router.probabilities(self._features_of(task)).float() for task in tasks])
        return [*whole, *shared], torch.cat([torch.ones(len(shares), len(whole)), shares], dim=1)

    def _features_of(self, task: Task) -> Tensor:
        """Return (questions, features), computed once, by all ranks together."""
        if task.name not in self._features:
            records = self._records[task.name]
            extractor = feature_extractor(self.config, self._session.base)
            mine = range(len(records))[rank() :: world_size()]
            label = f"{task.name}, for the router" if rank() == 0 else None
            roots = task_image_roots(self.config, task)
            local = torch.cat([torch.empty(0, extractor.features), *extractor.batches(records, mine, roots, label)])
            features = torch.empty(len(records), extractor.features)
            for other, part in enumerate(all_gather_object(local)):
                features[other :: world_size()] = part
            self._features[task.name] = features
        return self._features[task.name]

    def origin(self, stage: int, tasks: Sequence[Task]) -> Origin:
        """Return what decides the answers at a stage."""
        images = {task.name: self._image_digests.of(task) for task in tasks}
        return Origin(self._fingerprint(stage, tasks), None if self._asking.blank else fingerprint_of(images))

    def _fingerprint(self, stage: int, tasks: Sequence[Task]) -> str:
        return self._session.fingerprint(
            self.banks[:stage],
            method=self.config.method,
            router=self._routers[stage - 1],
            questions=[self._question_digests.get(task.name) for task in tasks],
            **method_of(self.config).router_settings(self.config),
            **self._asking.facts,
        )

    def possible(self, root: Path) -> dict[CellKey, set[Origin]]:
        """Return the possible origins for `write_summary`: the questions of a stage are mixed with those of the tasks
        learned by then, or of all tasks.

        Only stages whose entry of `routing.json` is there, and of these answers, are included.
        """
        origins: dict[CellKey, set[Origin]] = {}
        for stage in range(1, len(self.banks) + 1):
            together = root / f"stage-{stage}"
            sets = (self._asking.tasks(self.config, of) for of in (self.config.stream[:stage], self.config.stream))
            ways = {
                self.origin(stage, tasks) for tasks in sets if read_stamp(together, self._fingerprint(stage, tasks))
            }
            if ways:
                origins |= {(task.name, stage): ways for task in self.config.stream}
        return origins


def _router_digests(statistics: Sequence[TaskStatistics]) -> Iterator[str]:
    """Return for each stage the digest of the statistics behind its router."""
    digest = hashlib.sha256()
    for task in statistics:
        digest.update(task.mean.numpy().tobytes() + task.scatter.numpy().tobytes())
        if task.examples is not None:
            digest.update(task.examples.numpy().tobytes())
        yield digest.hexdigest()
