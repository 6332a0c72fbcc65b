"""`evaluation.json`: what decides an answer, the row of a cell, and the cells of one model put together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mslora_cr.config.run_files import EVALUATION
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.image_digests import images_digest
from mslora_cr.data.records import DataError, TestRecords
from mslora_cr.data.tasks import images_shown, test_file, test_records
from mslora_cr.evaluation.answer_files import Origin, answers_are_whole
from mslora_cr.evaluation.cells import CellKey
from mslora_cr.evaluation.doubts import doubts_of
from mslora_cr.evaluation.results import Cell, Evaluation
from mslora_cr.evaluation.schemas import ANSWERS, Stamp
from mslora_cr.evaluation.score import SCORES, group_numbers, metrics_of, question_groups
from mslora_cr.generation.run import Decoding
from mslora_cr.metrics.published import Scores
from mslora_cr.models.load import base_digest
from mslora_cr.runs.environment import environment
from mslora_cr.utils.files import file_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultsTarget:
    """The results folder of one model, and the names under which its scores are listed.

    Attributes:
        folder: The results folder.
        run: The name of the run, or of the served model.
        method: The method that trained the banks, or `served`.
    """

    folder: Path
    run: str
    method: str

    @classmethod
    def of_run(cls, config: StreamConfig, folder: Path | None = None) -> ResultsTarget:
        """Return the results folder of a configuration's own run, or another folder below it."""
        return cls(folder or config.results_run_dir, config.run, config.method)

    @property
    def path(self) -> Path:
        return self.folder / EVALUATION


def question_digests(
    config: StreamConfig,
    records: Mapping[str, TestRecords],
    path_of: Callable[[StreamConfig, Task], Path] = test_file,
) -> dict[str, str]:
    """Return the SHA-256 of the file of questions of every task that has one.

    Args:
        records: The open files by task; they are not read again.
        path_of: Returns the file of a task's questions.
    """
    paths = {task.name: path_of(config, task) for task in config.stream}
    others = {name: file_digest(path) for name, path in paths.items() if name not in records and path.is_file()}
    return others | {name: opened.digest for name, opened in records.items()}


class ImageDigests:
    """Digests of the images that tasks' questions show; those of a task are read when they are asked for."""

    def __init__(self, config: StreamConfig, records: Mapping[str, TestRecords]) -> None:
        """
        Args:
            records: The open files by task; they are not read again.
        """
        self._config, self._records = config, records
        self._digests: dict[str, str | None] = {}

    def of(self, task: Task) -> str | None:
        """Return the digest of a task's images; None of a task whose file is not open if file or images are not there.

        Raises:
            DataError: An image of an open file is missing.
        """
        if task.name not in self._digests:
            self._digests[task.name] = self._read(task)
        return self._digests[task.name]

    def _read(self, task: Task) -> str | None:
        opened = self._records.get(task.name)
        try:
            records = opened if opened is not None else test_records(self._config, task)
            return images_digest(images_shown(self._config, task, records))
        except DataError:
            if opened is not None:
                raise
            return None


UNDECIDING_DATA_FIELDS = {"root", "check_images", "cache_image_features", "validation", "validation_questions"}
"""Keys of `data` that change no answer."""


def decoding(config: StreamConfig) -> Decoding:
    return Decoding(
        max_new_tokens=config.evaluation.max_new_tokens,
        batch_size=config.evaluation.batch_size,
        model_id=Path(config.model.path).name,
        workers=int(config.training.get("dataloader_num_workers", 0)),
    )


def fingerprint_fields(config: StreamConfig) -> dict[str, Any]:
    """Return the fingerprint of answers; reads some of the base model's weights."""
    return {
        "model": config.model.model_dump(exclude={"device", "device_map", "path", "kernels"}),
        "weights": base_digest(config),
        "data": config.data.model_dump(exclude=UNDECIDING_DATA_FIELDS),
        "max_new_tokens": config.evaluation.max_new_tokens,
    }


def cell_row(
    task: Task,
    stage: int,
    banks: Sequence[str],
    folder: Path,
    root: Path,
    stamp: Stamp,
    records: TestRecords,
    scores: Scores,
) -> Cell:
    """Return a row of `evaluation.json`: the answers in `folder`, somewhere below `root`, and their scores."""
    measured = metrics_of(scores, group_numbers([group for _, group in question_groups(records)]))
    assert stamp.seconds is not None, "only a part of routed answers has none"
    return Cell(
        task=task.name,
        stage=stage,
        banks=tuple(banks),
        answers=str((folder / ANSWERS).relative_to(root)),
        questions=records.digest,
        rows=len(records),
        fingerprint=stamp.fingerprint,
        seconds=stamp.seconds,
        padding=stamp.padding,
        padding_unsorted=stamp.padding_unsorted,
        sha256=file_digest(folder / ANSWERS),
        scores_sha256=file_digest(folder / SCORES),
        images=stamp.images,
        greedy=stamp.greedy,
        **doubts_of(folder),
        metrics=measured.metrics,
        intervals=measured.intervals,
        freedom=measured.freedom,
        largest_cluster=measured.largest_cluster,
    )


def write_summary(
    config: StreamConfig, target: ResultsTarget, rows: Sequence[Cell], possible: Mapping[CellKey, Collection[Origin]]
) -> Evaluation:
    """Merge this call's cells into `evaluation.json`, task by task and stage by stage; returns what it now contains.

    Its cells are all of the same model, asked the same questions in the same way: one of an earlier call stays only if
    its answers are still those that it was scored from, and if these banks, questions and settings would give them
    again. Cells that are left out are named.

    Args:
        possible: The possible origins of each cell's answers with these banks, questions and settings.
    """
    old = Evaluation.read_if_whole(target.path)
    merged = {row.key: row for row in rows}
    left_out: dict[str, list[str]] = defaultdict(list)
    for row in old.cells if old else ():
        if row.key in merged:
            continue
        folder = (target.folder / row.answers).parent
        same = any(origin.gave(row.fingerprint, row.images) for origin in possible.get(row.key, ()))
        if same and answers_are_whole(folder, row.fingerprint, row.rows):
            merged[row.key] = row
        else:
            left_out[row.task].append(str(row.stage))
    if left_out:
        listing = "; ".join(f"{task} at stage {', '.join(stages)}" for task, stages in left_out.items())
        log.warning(
            "%s: left out, because other banks, questions, images or settings gave the answers: %s",
            target.path,
            listing,
        )
    order = [task.name for task in config.tasks]
    cells = [merged[key] for key in sorted(merged, key=lambda key: (order.index(key[0]), key[1]))]
    summary = Evaluation(
        run=target.run,
        method=target.method,
        banks_by=config.evaluation.banks_by,
        tasks=tuple(order),
        modalities={task.name: task.modality for task in config.stream},
        published={task.name: config.datasets[task.name].published for task in config.tasks},
        same_as={task.name: task.same_as for task in config.tasks if task.same_as is not None},
        stages=tuple(sorted({row.stage for row in cells})),
        cells=tuple(cells),
        environment=environment(),
    )
    summary.write(target.path)
    return summary
