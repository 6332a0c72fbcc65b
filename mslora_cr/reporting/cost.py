"""The cost of a run: device hours of training, and parameters of the banks that answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from mslora_cr.evaluation.results import Evaluation
from mslora_cr.reporting.sweep_result import Outcome
from mslora_cr.runs.entries import RunLedger


class Cost(NamedTuple):
    """`device_hours` of training, measured, and `parameters` of the banks that answer after the last evaluated stage,
    for the task with the most. None if the ledger does not know: for imported banks, or for version 0.1.0."""

    device_hours: float | None
    parameters: int | None


def cost_of(evaluation: Evaluation, ledger: RunLedger | None) -> Cost:
    """The cost of a run, from its ledger.

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
