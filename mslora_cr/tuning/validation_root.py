"""A data root in which validation questions take the place of the test questions.

A trial trains and is evaluated there with the code that trains and evaluates a run. The test questions are not in that
folder, so no choice can depend on them.
"""

from __future__ import annotations

import json
from pathlib import Path

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.records import DataError, TestRecord, TrainingRecords
from mslora_cr.data.tasks import VALIDATION, task_folder, training_file
from mslora_cr.data.validation import validation_split
from mslora_cr.utils.files import file_digest, hidden_folder, replace_folder, write_text

TRAIN, TEST = "train.json", "test.jsonl"
SHARE = 0.1
"""Share of the training records, where a data set has no `val.jsonl` and `data.validation` names no share."""


def make_validation_root(config: StreamConfig, root: Path, share: float = SHARE) -> None:
    """Write the folder of every task: its training records and, as `test.jsonl`, its validation questions.

    A task with a `val.jsonl` keeps its training records whole and is asked the questions of that file. Of any other
    task a share of the training records is taken out, by patient or image, alike for every method and trial. Images
    are linked. The questions stand there as `val.jsonl` too, for trials that validate while they train.

    Args:
        root: The folder to write; tasks that are there already are kept, unless their records have changed.
        share: Of the training records, in (0, 1), unless `data.validation` names one.

    Raises:
        DataError: A task has no records, or too few to take any out.
    """
    root.mkdir(parents=True, exist_ok=True)
    inside = {task_folder(config, task).resolve() for task in config.stream}
    for entry in sorted(Path(config.data.root).iterdir()):
        if entry.resolve() not in inside and entry.is_dir():
            _link(entry, root / entry.name)
    for task in config.stream:
        _task_folder(config, task, root / task.folder, config.data.validation or share)


def with_own_files(config: StreamConfig) -> StreamConfig:
    """Return the configuration for such a root, where every task has the framework's own files, a benchmark's tasks
    included."""
    names = {"train": TRAIN, "test": TEST, "benchmark": None, "references": None}
    return config.model_copy(
        update={"datasets": {name: of.model_copy(update=names) for name, of in config.datasets.items()}}
    )


def _task_folder(config: StreamConfig, task: Task, target: Path, share: float) -> None:
    source = task_folder(config, task)
    records, given = TrainingRecords(training_file(config, task)), source / VALIDATION
    mark = f"{records.digest} {file_digest(given) if given.is_file() else share} {VALIDATION}"
    if (target / ".made-from").is_file() and (target / ".made-from").read_text() == mark:
        return
    with hidden_folder(target) as staging:
        for entry in sorted(source.iterdir()):
            if entry.is_dir():
                _link(entry, staging / entry.name)
        if given.is_file():
            _link(source / task.train, staging / TRAIN)
            _link(given, staging / TEST)
            _link(given, staging / VALIDATION)
        else:
            _split(records, staging, share, config.seed, task.name)
        write_text(staging / ".made-from", mark)
        replace_folder(staging, target)


def _split(records: TrainingRecords, folder: Path, share: float, seed: int, task: str) -> None:
    split = validation_split(records, share, seed)
    if not split.questions or not split.training:
        raise DataError(f"{task}: {len(records)} training records leave none for validation; add a {VALIDATION}")
    content = json.loads(records.path.read_text(encoding="utf-8-sig"))
    write_text(folder / TRAIN, json.dumps([content[index] for index in split.training], ensure_ascii=False))
    for name in (TEST, VALIDATION):
        write_text(folder / name, "".join(_line(question) for question in split.questions))


def _line(question: TestRecord) -> str:
    content = question.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    return json.dumps(content, ensure_ascii=False) + "\n"


def _link(source: Path, target: Path) -> None:
    if not target.is_symlink():
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
