"""Shows the scores of an evaluation on the console."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.evaluation.asking import blind_score
from mslora_cr.evaluation.results import Evaluation
from mslora_cr.metrics.published import Scores
from mslora_cr.metrics.typed import CHOICE, TYPED
from mslora_cr.statistics.interval import bracketed

COLUMNS = {CHOICE: "exact choice", "close accuracy": "closed, letters found", "f1 score": "F1, open"}
"""Titles by name in `metrics.json`. The published closed accuracy accepts an answer that contains the letters of the
truth."""
ALIGNED = ("left", "right", "right", "right", "right", "right", "left", "left")
FIGURES = {"own_stage_average": "own stage", "final_average": "final average", "forgetting": "forgetting"}
CHANGE = "backward_transfer"


def score_table(evaluation: Evaluation, results_dir: Path) -> str:
    """Return each task's scores in percent when it was learned and after the last stage, as far as they were evaluated,
    and the averages over the tasks; for backward transfer also its interval and how many answers changed.

    Args:
        results_dir: The folder with the scores of the answers.
    """
    rows = []
    for task in evaluation.tasks:
        learned, last = evaluation.own_cell(task), evaluation.last_cell(task)
        for cell in (learned, last if last != learned else None):
            if cell is not None:
                scores = [number(cell.metrics.get(name)) for name in COLUMNS]
                blind = blind_score(cell, results_dir)
                guessing = guessing_of(results_dir / cell.answers)
                rows.append([task, cell.stage, cell.rows, *scores, guessing, blind.in_words() if blind else ""])
    headers = ["task", "stage", "questions", *COLUMNS.values(), "closed, against guessing", "without the picture"]
    if not any(row[-1] for row in rows):
        rows, headers = [row[:-1] for row in rows], headers[:-1]
    lines = [tabulate(rows, headers, disable_numparse=True, colalign=ALIGNED[: len(headers)])]
    for name, title in COLUMNS.items():
        if (matrix := evaluation.matrix(name)) is not None:
            figures = matrix.summary()
            available = [
                f"{words} {value:.1f}" for key, words in FIGURES.items() if (value := figures[key]) is not None
            ]
            if (change := figures[CHANGE]) is not None and matrix.last > 1:
                figure = evaluation.matrix_intervals(results_dir, name).figures[CHANGE]
                ends = bracketed(figure.ends, figure.changed, figure.precision)
                available.append(f"backward transfer {number(change)}{ends}")
            lines.append(f"{title}: {', '.join(available)}")
    return "\n".join(lines)


def guessing_of(answers: Path) -> str:
    """Return what guessing scores on a cell's closed questions; empty if the score is above it, or an earlier version
    scored."""
    clinical = Clinical.read_if_there(answers.with_name(CLINICAL))
    return clinical.closed.guessing.in_words() if clinical and clinical.closed else ""


def headline(scores: Scores) -> str:
    """Return the main scores of a file of answers, in percent, by the type of the answers. The published scores come
    last.
    """
    typed = {CHOICE: "exact choice, closed", "whole-word accuracy": "whole words, closed"}
    published = {"close accuracy": "letters found, closed (published)", "f1 score": "F1, open (published)"}
    others = {name: name for name in (*scores.benchmark, *TYPED) if name != CHOICE}
    titles = {name: others[name] for name in scores.benchmark} | typed | others | published
    averages = scores.added | scores.metrics
    lines = [[title, number(averages[name])] for name, title in titles.items() if name in averages]
    return tabulate(lines, ["score", "%"], disable_numparse=True, colalign=("left", "right")) if lines else "no answers"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number for people; a dash if there is none."""
    # Adding zero turns -0.0, which rounding may leave, into 0.0.
    return "–" if value is None else f"{round(value, digits) + 0:.{digits}f}"
