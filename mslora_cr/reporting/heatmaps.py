"""The report's heat maps: tables whose cells are tinted by their value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mslora_cr.banks.similarity import Similarity
from mslora_cr.evaluation.results import Evaluation
from mslora_cr.evaluation.schemas import Dropped, EffectiveRank, StageRouting
from mslora_cr.reporting.answers import TaskAnswers, confusions
from mslora_cr.statistics.matrix_intervals import Uncertainty


@dataclass(frozen=True)
class HeatCell:
    """A cell of a table.

    Attributes:
        note: A note in small print.
        tint: The strength of its tint, in [0, 1]; None leaves it blank.
        ends: The interval of its number.
        changed: For a difference, how many answers changed, with the test.
    """

    text: str = ""
    note: str = ""
    tint: float | None = None
    ends: tuple[float, float] | None = None
    changed: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A table of tinted cells, one row per name. `last` is a further, untinted column under `last_title`."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[HeatCell]]
    last_title: str = ""
    last: Sequence[HeatCell] = ()


def matrix_map(title: str, metric: str, evaluation: Evaluation, transfer: Mapping[str, Uncertainty]) -> HeatMap | None:
    """Draw a metric by task and stage; each cell notes the numbers of the banks that answered, and its interval.

    Args:
        transfer: By task, the uncertainty of its backward transfer.
    """
    matrix = evaluation.matrix(metric)
    if matrix is None:
        return None
    spans = {(cell.task, cell.stage): cell.intervals.get(metric) for cell in evaluation.cells}
    cells = {(cell.task, cell.stage): cell for cell in evaluation.cells}
    stages = range(min(1, *(stage for _, stage in matrix.scores)), matrix.last + 1)
    rows = {
        task: [
            HeatCell(f"{score:.1f}", evaluation.bank_numbers(cells[task, stage]), score / 100, spans[task, stage])
            if (score := matrix.scores.get((task, stage))) is not None
            else HeatCell()
            for stage in stages
        ]
        for task in matrix.tasks
    }
    points = matrix.transfer()
    last = [
        HeatCell(f"{round(points[task], 1) + 0:.1f}", ends=transfer[task].ends, changed=transfer[task].changed)
        if task in points
        else HeatCell("–")
        for task in rows
    ]
    return HeatMap(title, [str(stage) for stage in stages], rows, "change", last)


def similarity_map(similarity: Similarity) -> HeatMap:
    """Draw the lower triangle of the similarities, tinted over their range."""
    below = [value for index, row in enumerate(similarity.values) for value in row[:index]]
    low, span = min(below), max(below) - min(below)
    rows = {
        name: [
            HeatCell(f"{value:#.3g}", "", 0.15 + 0.85 * ((value - low) / span if span else 0.0))
            if column < index
            else HeatCell()
            for column, value in enumerate(similarity.values[index][:-1])
        ]
        for index, name in enumerate(similarity.banks)
        if index
    }
    return HeatMap("", similarity.banks[:-1], rows)


def confusion_map(stage: StageRouting) -> HeatMap:
    """Draw the routing table: for each task's questions (rows), the percentage assigned to each learned task; counts in
    small print.
    """
    rows = {
        task: [
            HeatCell(f"{100 * count / sum(counts):.1f}", str(count), count / sum(counts)) if count else HeatCell()
            for count in counts
        ]
        for task, counts in stage.confusion.items()
    }
    return HeatMap("", stage.learned, rows)


def answer_maps(task: TaskAnswers, last: int) -> list[HeatMap]:
    """Draw the confusions of a task's closed answers when it was learned and, if other banks answered then, after the
    last stage: truths (rows), answers (columns), counts tinted by their share of the row.
    """
    sets = {id(answers): answers for answers in (task.learned, task.at(last)) if answers is not None}
    maps = []
    for answers in sets.values():
        columns, counts = confusions(task, answers)
        if counts:
            rows = {
                truth: [HeatCell(str(count), "", count / sum(row)) if count else HeatCell() for count in row]
                for truth, row in counts.items()
            }
            maps.append(
                HeatMap(f"{task.task}, stage {answers.stages[0] if answers is task.learned else last}", columns, rows)
            )
    return maps


def cosine_map(title: str, banks: Sequence[str], rows_of: Mapping[str, Sequence[Sequence[float]]]) -> HeatMap:
    """Draw the cosines of every two banks' updates (rows) by layer or module (columns), tinted by size relative to
    the largest.
    """
    pairs = [(one, two) for two in range(len(banks)) for one in range(two)]
    largest = max((abs(values[one][two]) for values in rows_of.values() for one, two in pairs), default=0.0) or 1.0
    rows = {
        f"{banks[one]} · {banks[two]}": [
            HeatCell(f"{value:.2f}", "", abs(value) / largest)
            for values in rows_of.values()
            for value in [values[one][two]]
        ]
        for one, two in pairs
    }
    return HeatMap(title, list(rows_of), rows)


def contribution_map(rows: Sequence[Dropped]) -> HeatMap:
    """Draw the loss of each task (rows), in points, without each bank (columns); losses are tinted, intervals in small
    print.
    """
    banks = list(dict.fromkeys(row.dropped for row in rows))
    tasks: dict[str, dict[str, HeatCell]] = {}
    for row in rows:
        lost = row.contribution
        tint = max(0.0, min(1.0, lost / 100))
        cell = HeatCell(f"{round(lost, 1) + 0:+.1f}", "", tint, row.interval, row.note)
        tasks.setdefault(row.task, {})[row.dropped] = cell
    return HeatMap("", banks, {task: [cells.get(bank, HeatCell()) for bank in banks] for task, cells in tasks.items()})


def rank_map(runs: Mapping[str, Mapping[str, EffectiveRank]]) -> HeatMap:
    """Draw the mean effective rank of each bank (rows) in each run (columns), tinted by its share of the rank."""
    banks = dict.fromkeys(bank for ranks in runs.values() for bank in ranks)
    rows = {bank: [_rank(ranks.get(bank)) for ranks in runs.values()] for bank in banks}
    return HeatMap("", list(runs), rows)


def _rank(bank: EffectiveRank | None) -> HeatCell:
    return HeatCell(f"{bank.mean:.2f}", f"of {bank.rank}", bank.mean / bank.rank) if bank else HeatCell()


def final_scores_map(runs: Mapping[str, Evaluation], metric: str) -> HeatMap:
    """Draw each task after the last stage, with a column for each run, its interval and the banks that answered."""
    tasks = dict.fromkeys(task for run in runs.values() for task in run.tasks)
    rows = {task: [_final_score(run, task, metric) for run in runs.values()] for task in tasks}
    return HeatMap("", list(runs), {task: cells for task, cells in rows.items() if any(cell.text for cell in cells)})


def _final_score(run: Evaluation, task: str, metric: str) -> HeatCell:
    cell = run.last_cell(task)
    if cell is None or metric not in cell.metrics:
        return HeatCell()
    score = cell.metrics[metric]
    return HeatCell(f"{score:.1f}", run.bank_numbers(cell), score / 100, cell.intervals[metric])
