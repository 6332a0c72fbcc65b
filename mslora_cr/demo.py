"""The embedded demo: a tiny model, a synthetic stream, two methods on the same budget, and a report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.sources.catalog import catalog
from mslora_cr.distributed.comm import get_device
from mslora_cr.evaluation.evaluate import evaluate
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.reporting.comparison import write_comparison
from mslora_cr.reporting.report import write_report
from mslora_cr.runs.ledger import Ledger
from mslora_cr.stream import train as stream
from mslora_cr.synthetic.model import MODEL_FOLDER, make_tiny_llava_med
from mslora_cr.synthetic.stream import make_stream
from mslora_cr.utils.state import StateFile

log = logging.getLogger(__name__)

CONFIG = "demo"
MOST_THREADS = 2
"""Threads of the tiny model's operations: two take 67 ms a step where one takes 85; more have too little to share."""
COMPARED: tuple[str, ...] = ("mslora_cr", "sequential")
"""This project's method, and one LoRA trained throughout the stream."""


class DemoSummary(StateFile):
    """`summary.json`: the final figures of each compared method, and the total time."""

    MEND: ClassVar[str] = "remove it; the demo writes it again"

    methods: dict[str, dict[str, float]]
    seconds: float


def run_demo(overrides: Sequence[str] = ()) -> None:
    """Create what is missing, train and evaluate both methods, and write `summary.json` and the reports.

    Everything that an earlier call finished is kept, so a killed demo resumes.

    Raises:
        ConfigError: Before anything is created, if the demo cannot run like that.
    """
    started = time.monotonic()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    runs = _configurations(overrides)
    first = runs[COMPARED[0]]
    model, summary = Path(first.model.path), Path(first.results_dir) / "summary.json"
    complete, spent = _earlier_seconds(runs.values(), summary)
    make_stream(Path(first.data.root))
    make_tiny_llava_med(model.parent)
    for method, config in runs.items():
        log.info("%s: %d tasks, one after another", method, len(config.tasks))
        stream.train(config)
        evaluate(config, "seen")
        write_report(config.run_dir, config.results_run_dir, config)
    page = write_comparison(
        [(method, config.run_dir, config.results_run_dir) for method, config in runs.items()],
        summary.with_name("report.html"),
    )
    methods = {method: _outcome(config) for method, config in runs.items()}
    seconds = spent if complete else round(spent + time.monotonic() - started, 1)
    DemoSummary(methods=methods, seconds=seconds).write(summary)
    _say(methods, seconds, page)


def _configurations(overrides: Sequence[str]) -> dict[str, StreamConfig]:
    """Return the configuration of each compared method."""
    for key in {override.partition("=")[0] for override in overrides} & {"run", "method"}:
        raise ConfigError(f"{key}: the demo always compares {' and '.join(COMPARED)}; for another run: mslora-cr train")
    runs = {method: load_config(CONFIG, [*overrides, f"run={method}", f"method={method}"]) for method in COMPARED}
    first = runs[COMPARED[0]]
    if get_device(first.model.device).type == "cuda" and first.model.device == "auto":
        log.info(
            "the demo's model is so small that a GPU trains it no faster than the CPU; model.device=cuda uses the GPU"
        )
        return _configurations([*overrides, "model.device=cpu"])
    if Path(first.model.path).name != MODEL_FOLDER:
        raise ConfigError(
            f"model.path: the demo makes its own model, in a folder named {MODEL_FOLDER}, not {first.model.path}"
        )
    if first.evaluation.banks_by == "routed":
        raise ConfigError(
            "evaluation.banks_by: the demo is task-aware; after it, run mslora-cr evaluate demo --banks-by routed"
        )
    closed = {name for name, dataset in catalog().items() if dataset.test_rows.closed}
    if closed.isdisjoint(task.name for task in first.tasks):
        raise ConfigError("tasks: the demo compares closed questions, and none of these tasks has any; add one")
    return runs


def _earlier_seconds(runs: Iterable[StreamConfig], summary: Path) -> tuple[bool, float]:
    """Return whether an earlier call did everything, and its time; otherwise the time that earlier calls spent on
    finished tasks.

    So the time shown is that of the whole work, even if this call had little or nothing left to do.
    """
    tasks = [(Ledger.read(config).tasks, config) for config in runs]
    trained = all(task.name in done for done, config in tasks for task in config.tasks)
    if trained and summary.is_file():
        return True, DemoSummary.read(summary).seconds
    return False, sum(entry.seconds for done, _ in tasks for entry in done.values())


def _outcome(config: StreamConfig) -> dict[str, Any]:
    evaluation = read_evaluation(config.results_run_dir)
    matrix = evaluation.matrix("close accuracy") if evaluation else None
    assert matrix is not None, "the embedded stream has closed questions"
    return {"average_closed_accuracy": matrix.final_average(), "forgetting": matrix.forgetting()}


def _say(methods: Mapping[str, dict[str, Any]], seconds: float, page: Path) -> None:
    print(f"\n{'':<14}{'average closed accuracy':>25}{'forgetting':>14}")
    for method, outcome in methods.items():
        print(f"{method:<14}{outcome['average_closed_accuracy']:>23.1f} %{outcome['forgetting']:>9.1f} pts")
    print(f"\n{seconds:.0f} seconds. The figures: {page.parent / 'summary.json'}\nThe report: {page.resolve()}")
