"""Methods × orders × seeds of one stream: planned, run in parallel, gathered into one table."""

from __future__ import annotations

import itertools
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mslora_cr.analysis.class_figures import FIGURES, LOWER_IS_BETTER, class_matrices
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import load_method, method_names
from mslora_cr.config.run_files import EVALUATION
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.config.trust import name_method
from mslora_cr.distributed.pool import output_into, spare_imports, worker_pool
from mslora_cr.evaluation.evaluate import evaluate
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.evaluation.routed import evaluate_routed
from mslora_cr.evaluation.schemas import ROUTED
from mslora_cr.methods.base import method_of, needs_task
from mslora_cr.reporting.capacity import answering_rank, cost_of
from mslora_cr.reporting.run_record import read_ledger
from mslora_cr.reporting.style import MATRICES, METRICS
from mslora_cr.reporting.sweep_page import write_sweep_page
from mslora_cr.reporting.sweep_result import RESULT, SweepResult
from mslora_cr.runs.environment import environment
from mslora_cr.runs.lock import one_writer
from mslora_cr.statistics.sweep_summary import summarize
from mslora_cr.stream import train as stream
from mslora_cr.stream.orders import latin_orders, task_orders
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.logs import set_up
from mslora_cr.utils.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    method: str
    order: int
    """0 is the order of the file; the others are drawn."""
    seed: int
    config: StreamConfig

    @property
    def name(self) -> str:
        return self.config.run

    @property
    def results(self) -> Path:
        """The folder of its scores."""
        routed = self.config.evaluation.banks_by == "routed"
        return self.config.results_run_dir / ROUTED if routed else self.config.results_run_dir


def plan_sweep(
    config_file: Path,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = (),
    orders: int | Literal["latin"] = 1,
    seeds: Sequence[int] = (),
) -> list[SweepRun]:
    """Plan the runs of a sweep, method by method. Their folders are below those of the file's own run.

    With `evaluation.banks_by` `routed`, a method that answers every task with the same banks has nothing to route. Its
    runs use `prefix`, which does not tell them the task either.

    Args:
        overrides: Overrides of every run; those of one method's section, as `ewc.strength=10`, apply to its runs alone.
        methods: The methods; by default all of the package. `module:Class` names others, which go by their `name`.
        orders: The number of task orders; the first is the file's, further ones are drawn, the same every time. Or
            `latin`: those of a balanced Latin square (`latin_orders`).
        seeds: The seeds; by default the file's.

    Raises:
        ConfigError: An unknown method, an override of what the sweep sets itself, more orders than there are, or an
            invalid configuration.
    """
    chosen = _by_name(methods or method_names())
    sections = {override: override.partition("=")[0].partition(".")[0] for override in overrides}
    decided = {"method": "name several with --methods", "run": "a run is named by its method, order and seed"}
    for key in decided.keys() & set(sections.values()):
        raise ConfigError(f"{key}: a sweep sets it itself; {decided[key]}")
    if seeds and "seed" in sections.values():
        raise ConfigError("seed: --seeds names them; leave one of the two out")
    of_methods = chosen.keys() | method_names()
    for section in sorted(of_methods & set(sections.values()) - chosen.keys()):
        raise ConfigError(f"{section}: belongs to method {section!r}, which is not in this sweep")
    base = load_config(config_file, [override for override in overrides if sections[override] not in of_methods])
    folders = [f"output_dir={base.run_dir}", f"results_dir={base.results_run_dir}"]
    names = [task.name for task in base.tasks]
    drawn = latin_orders(names) if orders == "latin" else task_orders(names, orders)
    runs = []
    for method, (number, tasks), seed in itertools.product(
        chosen, enumerate(drawn), dict.fromkeys(seeds or [base.seed])
    ):
        of_method = [override for override in overrides if sections[override] not in of_methods - {method}]
        settings = [f"run={method}-order{number}-seed{seed}", f"method={chosen[method]}", f"seed={seed}"]
        everything = [*of_method, *folders, *settings, f"tasks=[{','.join(tasks)}]"]
        config = load_config(config_file, everything)
        if config.evaluation.banks_by == "routed" and not needs_task(config):
            config = load_config(config_file, [*everything, "evaluation.banks_by=prefix"])
        runs.append(SweepRun(method, number, seed, config))
    return runs


def _by_name(methods: Sequence[str]) -> dict[str, str]:
    """Return values for `method:`, by the method's own name."""
    paths: dict[str, str] = {}
    for method in methods:
        name_method(method)
        try:
            name = load_method(method).name
        except ValueError as error:
            raise ConfigError(f"--methods: {error}") from None
        if paths.setdefault(name, method) != method:
            raise ConfigError(f"--methods: {paths[name]} and {method} are both named {name!r}")
    return paths


def describe(runs: Sequence[SweepRun], devices: Sequence[str | None]) -> str:
    """Describe the plan: the runs, how many run at once, where, and what is done already."""
    methods = dict.fromkeys(run.method for run in runs)
    orders = {run.order: [task.name for task in run.config.tasks] for run in runs}
    seeds = dict.fromkeys(run.seed for run in runs)
    where = "CPU" if devices[0] is None else f"GPU {', '.join(str(device) for device in dict.fromkeys(devices))}"
    lines = [
        f"{len(runs)} runs = {len(methods)} methods × {len(orders)} orders × {len(seeds)} seeds, "
        f"{len(devices)} at once ({where})",
        f"methods  {', '.join(methods)}",
        *(f"order {number}  {' → '.join(tasks)}" for number, tasks in orders.items()),
        f"seeds    {', '.join(map(str, seeds))}",
        f"folders  {runs[0].config.run_dir.parent}, {runs[0].config.results_run_dir.parent}",
        "",
    ]
    width = max(len(run.name) for run in runs)
    for run in runs:
        ledger = read_ledger(run.config.run_dir)
        evaluated = " and evaluated" if (run.results / EVALUATION).is_file() else ""
        trained = len(method_of(run.config).trained(run.config))
        learned = f"{len(ledger.tasks)} of {trained} tasks learned{evaluated}" if ledger else "to do"
        lines.append(f"  {run.name:<{width}}  {learned}")
    return "\n".join(lines)


def run_sweep(runs: Sequence[SweepRun], devices: Sequence[str | None]) -> Path:
    """Train and evaluate every run that is not done yet, as many at once as there are devices, and write the report.

    The output of a run goes into `sweep.log` in its results folder. A run that fails does not stop the others. An
    interrupted sweep leaves `sweep.json` of the finished runs; all methods of one seed come before the next seed.

    Returns:
        The page. `sweep.json`, `sweep.md` and `sweep.svg` are beside it.

    Raises:
        UserError: Runs failed; the message names them and their logs. The report has the others.
        LockedError: Another sweep writes there.
    """
    root = runs[0].config.results_run_dir.parent
    with one_writer(root):
        outcomes, failed = _run_all(runs, devices, root)
        page = write_sweep_page(SweepResult.read(root / RESULT), root) if outcomes else None
    if failed or page is None:
        lines = "\n  ".join(f"{name}: {error} ({root / name / 'sweep.log'})" for name, error in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; the same command retries them\n  {lines}")
    return page


def _run_all(
    runs: Sequence[SweepRun], devices: Sequence[str | None], root: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the figures of the successful runs, and the errors of the others, both by name."""
    failed: dict[str, str] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    with worker_pool(devices) as pool, progress_bar(desc="sweep", total=len(runs), unit="run") as bar:
        # All methods of a seed and order come before the next one, so that an interrupted sweep can be compared in
        # pairs.
        waiting = {pool.submit(_run, run.config): run for run in sorted(runs, key=_run_order(runs))}
        for done in as_completed(waiting):
            error = done.exception()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a process of the sweep died (out of memory?); the same command resumes with what is missing, "
                    "and --jobs 1 needs the least memory"
                ) from None
            run = waiting[done]
            if error is not None:
                failed[run.name] = str(error)
            else:
                outcomes[run.name] = _outcome(run)
                _write(runs, outcomes, root)  # After every run, so that an interrupted sweep leaves its results.
            bar.set_postfix_str(run.name)
            bar.update()
    return outcomes, failed


def _run(config: StreamConfig) -> None:
    """Train and evaluate one run in a worker; its output goes into a file."""
    folder = config.results_run_dir
    folder.mkdir(parents=True, exist_ok=True)
    set_up()
    spare_imports()
    with output_into(folder / "sweep.log"):
        try:
            stream.train(config)
            if config.evaluation.banks_by == "routed":
                evaluate_routed(config, "seen")
            else:
                evaluate(config, "seen")
        except UserError as error:
            log.error("%s", error)
            raise UserError(str(error)) from None  # Other exceptions may not survive the way to the parent process.
        except Exception as error:
            traceback.print_exc()
            raise UserError(repr(error)) from None


# --- results --------------------------------------------------------------------------------------------------------


def _run_order(runs: Sequence[SweepRun]) -> Callable[[SweepRun], tuple[int, int]]:
    """Return the sort key of runs: the position of the seed, then the order."""
    positions = {seed: position for position, seed in enumerate(dict.fromkeys(run.seed for run in runs))}
    return lambda run: (positions[run.seed], run.order)


def _write(runs: Sequence[SweepRun], outcomes: Mapping[str, dict[str, Any]], root: Path) -> None:
    """Write `sweep.json` of the finished runs, in the order of the plan."""
    finished = [run for run in runs if run.name in outcomes]
    orders = {run.order: [task.name for task in run.config.tasks] for run in finished}
    finished_outcomes = [outcomes[run.name] for run in finished]
    measured = {*METRICS} | {key for outcome in finished_outcomes for key in outcome["figures"]}
    result = SweepResult.model_validate(
        {
            "orders": {str(number): tasks for number, tasks in sorted(orders.items())},
            "seeds": sorted({run.seed for run in finished}),
            "metrics": {key: summarize(finished_outcomes, key) for key in (*MATRICES, *FIGURES) if key in measured},
            "runs": finished_outcomes,
            "environment": environment(),
        }
    )
    result.write(root / RESULT)


def _outcome(run: SweepRun) -> dict[str, Any]:
    """Return the figures of a finished run, by metric."""
    evaluation, ledger = read_evaluation(run.results), read_ledger(run.config.run_dir)
    assert evaluation is not None, f"{run.name} is not evaluated"
    matrices = {key: evaluation.matrix(metric) for key, metric in MATRICES.items()}
    figures = {}
    for key, matrix in (matrices | class_matrices(evaluation, run.results)).items():
        if matrix is not None:
            final = {task: matrix.scores.get((task, matrix.last)) for task in matrix.tasks}
            summary = matrix.summary()
            if key in LOWER_IS_BETTER:  # the others take the higher value for the better one
                summary = {name: value for name, value in summary.items() if name.endswith(("average", "accuracy"))}
            figures[key] = {**summary, "final": final}
    return {
        "run": run.name,
        "method": run.method,
        "order": run.order,
        "seed": run.seed,
        "banks_by": evaluation.banks_by,
        "told": evaluation.same_banks_since_learned(),
        "rank": answering_rank(evaluation, ledger),
        "seconds": ledger.seconds if ledger else 0.0,
        **cost_of(evaluation, ledger)._asdict(),
        "figures": figures,
    }
