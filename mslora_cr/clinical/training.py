"""Counts how often each answer follows each question in a task's training records."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.records import DataError, TrainingRecords
from mslora_cr.data.tasks import training_file
from mslora_cr.metrics.guessing import Frequencies, training_answers

MOST_TRAINING = 20_000
"""At most this many training records are read: a random sample where there are more."""


def task_frequencies(config: StreamConfig, task: Task) -> Frequencies | None:
    """Count the answers of a task's training records, where these are at hand."""
    return training_frequencies(training_file(config, task))


def training_frequencies(path: Path) -> Frequencies | None:
    """Count how often each answer follows each question in `train.json`; None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _frequencies(path, status.st_mtime_ns)


@lru_cache(maxsize=32)
def _frequencies(path: Path, modified: int) -> Frequencies | None:
    try:
        return training_answers(TrainingRecords(path).thinned(MOST_TRAINING))
    except DataError:  # evaluation needs no training records
        return None
