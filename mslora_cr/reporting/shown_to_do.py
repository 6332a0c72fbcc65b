"""What an evaluation shows that a model can do, and what it leaves open: a line a task, in report and model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mslora_cr.clinical.file import CLINICAL, Clinical, ClosedMeasured
from mslora_cr.data.sources.leaks import Leaks
from mslora_cr.evaluation.asking import blind_score
from mslora_cr.evaluation.results import Cell, Evaluation
from mslora_cr.evaluation.schemas import ROUTED, ROUTING, Routing, StageRouting
from mslora_cr.evaluation.score import SCORES, read_scores
from mslora_cr.metrics.typed import CHOICE
from mslora_cr.routing.foreign import BOTH
from mslora_cr.statistics.interval import bracketed

TITLE = "What this model was shown to do"
UNKNOWN = "not known"
COLUMNS = (
    *("task", "closed questions", "against guessing", "open questions (F1)", "measured on", "in training too"),
    *("subgroups", "calibration error", "without the picture", "like no learned task"),
)


class ShownTask(NamedTuple):
    """A task after its last evaluated stage; what is not known is said. The fields stand in the order of `COLUMNS`."""

    task: str
    closed: str
    guessing: str
    opened: str
    measured_on: str
    leaks: str
    subgroups: str
    calibration: str
    blind: str
    foreign: str


def last_cells(evaluation: Evaluation) -> list[Cell]:
    """Return the cell of each task after its last evaluated stage, if that is the last of all or the task's own."""
    cells = (evaluation.last_cell(task) or evaluation.own_cell(task) for task in evaluation.tasks)
    return [cell for cell in cells if cell is not None]


def shown_to_do(cells: Iterable[Cell], results_dir: Path, leaks: Mapping[str, Leaks]) -> list[ShownTask]:
    """Return a line for each cell.

    Args:
        leaks: What `data check` found in both training and testing, by task.
    """
    routing = Routing.read_if_there(results_dir / ROUTED / ROUTING)
    last = routing.stages[-1] if routing else None
    return [_row(cell, results_dir, leaks.get(cell.task), last) for cell in cells]


def _row(cell: Cell, results_dir: Path, leaks: Leaks | None, routing: StageRouting | None) -> ShownTask:
    answers = results_dir / cell.answers
    clinical = Clinical.read_if_there(answers.with_name(CLINICAL))
    closed = clinical.closed if clinical else None
    return ShownTask(
        task=cell.task,
        closed=_score(cell, CHOICE) if CHOICE in cell.metrics else "none asked" if closed is None else UNKNOWN,
        guessing=_against_guessing(closed),
        opened=_score(cell, "f1 score") if "f1 score" in cell.metrics else "none asked",
        measured_on=_measured_on(cell, answers),
        leaks="not checked" if leaks is None else leaks.sentence() if leaks.any else "nothing found",
        subgroups=_subgroups(clinical),
        calibration=_calibration(closed),
        blind=blind.in_words() if (blind := blind_score(cell, results_dir)) else UNKNOWN,
        foreign=_foreign(cell.task, routing),
    )


def _foreign(task: str, routing: StageRouting | None) -> str:
    """How many of a task's questions are taken for foreign, and how many would be if the task had not been learned."""
    if routing is None or routing.foreign is None or task not in routing.foreign:
        return UNKNOWN
    share = f"{100 * routing.foreign[task] / max(1, sum(routing.confusion[task])):.1f} % flagged"
    held_out = routing.held_out.get(task, {}).get(BOTH)
    return f"{share}; {held_out.detected:.1f} % if it had not been learned" if held_out else share


def _score(cell: Cell, name: str) -> str:
    return f"{cell.metrics[name]:.1f} %{bracketed(cell.intervals[name])}"


def _against_guessing(closed: ClosedMeasured | None) -> str:
    if closed is None:
        return UNKNOWN
    guessing = closed.guessing
    return guessing.in_words() or f"above by {guessing.gain:.1f} points{bracketed(guessing.interval)}"


def _calibration(closed: ClosedMeasured | None) -> str:
    calibration = closed.calibration if closed else None
    if calibration is None:
        return UNKNOWN
    scaled = (
        ""
        if calibration.scaled_error is None
        else f", {100 * calibration.scaled_error:.1f} % at the fitted temperature"
    )
    return f"{100 * calibration.expected_error:.1f} %{scaled}"


def _measured_on(cell: Cell, answers: Path) -> str:
    scores = answers.with_name(SCORES)
    if not scores.is_file():
        return f"{cell.rows} questions"
    table = read_scores(scores)
    patients = {patient for patient in table.patients if patient}
    images = {image for image in table.images if image}
    about = f"{len(patients)} patients" if patients else f"{len(images)} images, patients not known" if images else ""
    return f"{cell.rows} questions{f' of {about}' if about else ', images and patients not known'}"


def _subgroups(clinical: Clinical | None) -> str:
    measured = {name: one for name, one in (clinical.subgroups if clinical else {}).items() if one.gap is not None}
    if not measured:
        return UNKNOWN
    name, worst = max(measured.items(), key=lambda item: item[1].gap.value if item[1].gap else 0.0)
    assert worst.gap is not None
    ends = worst.gap.interval
    gap = f"{100 * worst.gap.value:.1f} points{bracketed(ends and (100 * ends[0], 100 * ends[1]))}"
    shortcuts = [other for other, one in clinical.subgroups.items() if one.shortcut] if clinical else []
    warning = f"; shortcut: {', '.join(shortcuts)}" if shortcuts else ""
    return f"largest gap {gap}, by {name}, worst {worst.worst}{warning}"
