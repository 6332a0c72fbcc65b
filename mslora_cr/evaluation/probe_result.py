"""`probe/DATASET/probe.json`, typed, and its table. Separate from `probe`, so that reading it loads no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tabulate import tabulate

from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.schemas import PairedNote
from mslora_cr.statistics.interval import Interval, bracketed, counted
from mslora_cr.utils.state import Part, StateFile

PROBE = "probe"
"""The folder below a results folder for answers to held-out data sets, and the name of their `.json`."""
MEASURED = {"close accuracy": "closed", "f1 score": "F1, open", "exact match score": "exact"}
"""Title by name in `metrics.json`."""


class Loss(Part):
    """The loss of a metric against the base model: both scores in percent, the loss in points (positive if the base is
    better), and its interval, paired by question.

    `changed` of the `questions` have another score, and `change` has the tests. Version 0.1.0 noted none of the three,
    and no interval if fewer than five had changed.
    """

    stage: int
    metric: str
    base: float
    score: float
    loss: float
    interval: Interval | None
    changed: int | None = None
    questions: int | None = None
    change: PairedNote | None = None

    @property
    def note(self) -> str:
        """Remarks shown beside the interval."""
        return self.change.text if self.change else counted(self.changed, self.questions)


class Probe(StateFile):
    """`probe/DATASET/probe.json`: a held-out data set at every stage (0 is the base model), and the losses."""

    MEND: ClassVar[str] = "remove it; `mslora-cr evaluate CONFIG --probe DATASET` writes it again from the answers"

    run: str
    method: str
    banks_by: str
    dataset: str
    cells: tuple[Cell, ...]
    losses: tuple[Loss, ...]
    environment: dict[str, Any]

    def last(self) -> list[Loss]:
        """Return the losses after the last stage."""
        return [loss for loss in self.losses if loss.stage == self.cells[-1].stage]


def read_probes(results_dir: Path) -> list[Probe]:
    """Return the results on held-out data sets, in the order of their names.

    Raises:
        StateError: One is damaged, or a later version wrote it.
    """
    return [Probe.read(path) for path in sorted((results_dir / PROBE).glob(f"*/{PROBE}.json"))]


def probe_table(probe: Probe) -> str:
    """Return the losses as a table for the console."""
    rows = [
        [
            row.stage,
            MEASURED[row.metric],
            f"{row.base:.1f}",
            f"{row.score:.1f}",
            f"{row.loss:+.1f}{bracketed(row.interval, row.note)}",
        ]
        for row in probe.losses
    ]
    title = f"{probe.dataset}, a held-out data set, {probe.cells[0].rows} questions"
    headers = ["stage", "score", "base", "at the stage", "lost"]
    return f"{title}\n{tabulate(rows, headers, disable_numparse=True)}" if rows else f"{title}: the base alone answers"
