"""The rank of the update that the answering banks add to the base weights, which grows where banks are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, cast

from mslora_cr.config.methods import load_method
from mslora_cr.config.run_files import LEDGER
from mslora_cr.evaluation.results import Cell, Evaluation, read_evaluation
from mslora_cr.methods.base import Method
from mslora_cr.reporting.sweep_result import Outcome
from mslora_cr.runs.entries import RunLedger


def answering_rank(evaluation: Evaluation, ledger: RunLedger | None) -> int | None:
    """Return the rank of the banks that answer after the last evaluated stage, for the task with the most; 0 for the
    base alone.

    None if a bank's rank or the method is unknown: for imported runs, or a method outside the package.
    """
    method = method_named(evaluation.method)
    if method is None:
        return None
    ranks = bank_ranks(method, ledger)
    totals = []
    for cell in evaluation.cells:
        of_banks = [ranks.get(bank) for bank in _answering(evaluation, method, cell)]
        if cell.stage == evaluation.stages[-1]:
            totals.append(None if None in of_banks else sum(rank for rank in of_banks if rank is not None))
    return None if None in totals else max((rank for rank in totals if rank is not None), default=None)


def bank_ranks(method: Method, ledger: RunLedger | None) -> dict[str, int | None]:
    """Return the rank of each finished task's bank; None if the ledger does not know it."""
    finished = ledger.tasks.items() if ledger else ()
    return {
        name: method.bank_rank(entry.rank, number) if entry.rank else None
        for number, (name, entry) in enumerate(finished, start=1)
    }


def rendered_ranks(runs: Sequence[tuple[str, Path | None, Path]]) -> str:
    """Return a line with each run's answering rank; empty if none is known.

    Args:
        runs: By label, the run folder, if it is known, and the results folder.
    """
    ranks = {}
    for label, run_dir, results_dir in runs:
        evaluation = read_evaluation(results_dir)
        rank = answering_rank(evaluation, RunLedger.read_if_there(run_dir / LEDGER)) if evaluation and run_dir else None
        ranks[label] = rank
    if all(rank is None for rank in ranks.values()):
        return ""
    listed = ", ".join(f"{label} {'–' if rank is None else rank}" for label, rank in ranks.items())
    return f"Rank that answers after the last stage: {listed}; runs of different rank differ in capacity."


def method_named(name: str) -> Method | None:
    """Return the method of that name; None if it is outside the package and not available."""
    try:
        return cast(Method, load_method(name))
    except ValueError:
        return None


def _answering(evaluation: Evaluation, method: Method, cell: Cell) -> Sequence[str]:
    """Return the banks that answer a question of a cell; if it is routed, those of the predicted task."""
    if evaluation.banks_by != "routed" or method.mixes_banks:
        return cell.banks
    numbers = method.banks(min(evaluation.tasks.index(cell.task) + 1, cell.stage), cell.stage, "prefix")
    return [cell.banks[number - 1] for number in numbers]


class Cost(NamedTuple):
    """`device_hours` of training, measured, and `parameters` of the banks that answer after the last evaluated stage,
    for the task with the most. None if the ledger does not know: for imported banks, or for version 0.1.0."""

    device_hours: float | None
    parameters: int | None


def cost_of(evaluation: Evaluation, ledger: RunLedger | None) -> Cost:
    """Return the cost of a run, from its ledger.

    Every trained bank counts, whichever answers. If a router or a method mixes banks, all that may answer count.
    """
    entries = ledger.tasks if ledger else {}
    sizes = {name: entry.parameters for name, entry in entries.items()}
    hours = [entry.device_hours for entry in entries.values()]
    last = [cell for cell in evaluation.cells if cell.stage == evaluation.stages[-1]]
    answering = [[sizes.get(bank) for bank in cell.banks] for cell in last]
    sums = [sum(size for size in of_cell if size is not None) for of_cell in answering if None not in of_cell]
    return Cost(
        device_hours=sum(hour for hour in hours if hour is not None) if ledger and None not in hours else None,
        parameters=max(sums, default=0) if len(sums) == len(last) else None,
    )


def mean_costs(runs: Sequence[Outcome]) -> dict[str, Cost]:
    """Return the mean of each method's device hours, and its parameters; None if a run does not know them."""
    costs = {}
    for method in dict.fromkeys(run.method for run in runs):
        of_method = [run for run in runs if run.method == method]
        hours, sizes = [run.device_hours for run in of_method], [run.parameters for run in of_method]
        costs[method] = Cost(
            device_hours=fmean(hour for hour in hours if hour is not None) if None not in hours else None,
            parameters=max(size for size in sizes if size is not None) if None not in sizes else None,
        )
    return costs


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the labels of the points (cost, score) that no other point beats, the cheapest first: all that cost less
    score lower."""
    best, labels = float("-inf"), []
    for label, (_, score) in sorted(points.items(), key=lambda point: (point[1][0], -point[1][1])):
        if score > best:
            best = score
            labels.append(label)
    return labels
