"""The sweep of docs/explanation/preregistration-tuned.md: every method tuned on the same budget, then compared.

    mslora-cr demo                                          # makes the tiny model and the stream, once
    python -m benchmarks.tuned_sweep --jobs 1               # tunes, then runs three sweeps; resumes
    python -m benchmarks.tuned_sweep --report               # the tables and the frontier of the finished runs

Trials see validation questions of a seed and an order that no sweep reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.distributions import FloatDistribution
from scipy.stats import kendalltau
from tabulate import tabulate

from mslora_cr.config.methods import method_names
from mslora_cr.distributed.pool import devices
from mslora_cr.reporting.capacity import frontier, mean_costs
from mslora_cr.reporting.plots import frontier_dots
from mslora_cr.reporting.sweep_page import cost_points
from mslora_cr.reporting.sweep_result import RESULT, SweepResult
from mslora_cr.statistics.interval import span
from mslora_cr.statistics.intervals import estimate_of, mean_interval
from mslora_cr.statistics.significance import flip_test, holm
from mslora_cr.sweep import SweepRun, plan_sweep, run_sweep
from mslora_cr.tuning.space import Space, read_space
from mslora_cr.tuning.study import Plan, best_trial, studies, tune
from mslora_cr.utils.files import write_text

CONFIG = Path("configs/sweep.yaml")
TASKS = ("tasks=[pathvqa, PCAM, CXP]", "tasks.*.epochs=1", "tasks.PCAM.batch_size=8", "tasks.CXP.batch_size=8")
"""30 steps for each task."""
STREAM = (*TASKS, "training.gradient_checkpointing=false")
SHORTENED = {
    "ewc": ("ewc.fisher_batches=4",),
    "inflora": ("inflora.samples=16",),
    "keeplora": ("keeplora.samples=16",),
}
"""Fewer samples for what these methods compute after a task; with the defaults that takes longer than the training."""
RATES = FloatDistribution(1e-3, 2e-2, log=True)
"""Learning rates of a model this small; the shipped spaces have those of billions of parameters."""
TRIALS = 5
TUNED_SEEDS, TUNED_SHARE = (101,), 0.25
SEEDS, ORDERS = (1, 2, 3, 4, 5), 2
NOTHING_TO_TUNE = "zero_shot"
ONE_BANK = ("each", "ewc", "joint", "moe_lora", "mr_lora", "replay", "sequential")
"""Methods whose answers come from one bank of rank 8, where others add three."""
TUNED, WIDE = "tuned", "rank24"
"""Endings of the labels of runs."""
METRIC = "exact"
EQUAL_PARAMETERS = ("lora.rank=24", "lora.alpha=24")
CHECKPOINTS, RESULTS = Path("checkpoints/tuned_sweep"), Path("results/tuned_sweep")
Finals = dict[str, dict[tuple[int, int], float]]
"""A figure by label, order and seed."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuned_sweep", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one per core)")
    parser.add_argument("--report", action="store_true", help="only write report.md and frontier.svg of finished runs")
    args = parser.parse_args(argv)
    if args.report:
        print(report())
        return
    used = devices("cpu", args.jobs)
    started = time.monotonic()
    for method in tuned_methods():
        tune(tuning(method), used)
        print(f"{time.monotonic() - started:.0f} s: {method} {chosen(method)}", flush=True)
    for name, runs in sweeps().items():
        run_sweep(runs, used)
        print(f"{time.monotonic() - started:.0f} s: {name}, {len(runs)} runs", flush=True)
    print(report())


def tuned_methods() -> list[str]:
    return [method for method in sorted(method_names()) if method != NOTHING_TO_TUNE]


def tuning(method: str) -> Plan:
    """The tuning of one method: its shipped space, with the learning rates of a tiny model and one epoch."""
    return Plan(
        CONFIG,
        (
            *STREAM,
            *SHORTENED.get(method, ()),
            f"method={method}",
            f"run={method}",
            f"output_dir={CHECKPOINTS}",
            f"results_dir={RESULTS}/tuning",
        ),
        Space(read_space(method).stream, {"learning_rate": RATES}),
        TRIALS,
        seeds=TUNED_SEEDS,
        share=TUNED_SHARE,
        reported=ORDERS,
    )


def chosen(method: str) -> dict[str, Any]:
    """The values of the best trial."""
    best = best_trial(studies(tuning(method).folder)["streams"])
    assert best is not None, f"no trial of {method} finished"
    return dict(best.params)


def sweeps() -> dict[str, list[SweepRun]]:
    """The runs by sweep: defaults and tuned values seed by seed, then more rank for methods of one bank."""
    values = {method: [f"{key}={value}" for key, value in chosen(method).items()] for method in tuned_methods()}
    both = [*_runs("compared", method_names(), {}), *_runs("compared", values, values, TUNED)]
    wide = {method: [*values[method], *EQUAL_PARAMETERS] for method in ONE_BANK}
    return {"compared": both, "equal_parameters": list(_runs("equal_parameters", ONE_BANK, wide, WIDE))}


def _runs(
    folder: str, methods: Sequence[str] | dict[str, Any], values: dict[str, list[str]], label: str = ""
) -> Iterator[SweepRun]:
    places = [f"output_dir={CHECKPOINTS}/{folder}", f"results_dir={RESULTS}/{folder}"]
    for method in methods:
        settings = [*STREAM, *SHORTENED.get(method, ()), *places, *values.get(method, ())]
        for run in plan_sweep(CONFIG, settings, [method], ORDERS, SEEDS):
            name = f"{method}-{label}" if label else method
            config = run.config.model_copy(update={"run": run.config.run.replace(method, name, 1)})
            yield SweepRun(name, run.order, run.seed, config)


# --- report ---------------------------------------------------------------------------------------------------------


def report() -> str:
    """Return the tables as Markdown; they and the frontier of tuned methods are written into the results folder."""
    compared = _read("compared")
    assert compared is not None, "no run has finished"
    finals = final_averages(compared, "final_average")
    forgotten = final_averages(compared, "forgetting")
    parts = [rankings(finals, forgotten), _costs(compared, finals), _tuning_table()]
    if wide := _read("equal_parameters"):
        parts.insert(2, _capacity(compared, wide, finals))
    text = "\n\n".join(parts) + "\n"
    write_text(RESULTS / "report.md", text)
    return text


def _read(folder: str) -> SweepResult | None:
    return SweepResult.read_if_there(RESULTS / folder / "sweep" / RESULT)


def final_averages(sweep: SweepResult | None, figure: str) -> Finals:
    """A figure of exact match, by label, order and seed."""
    found: Finals = {}
    for run in sweep.runs if sweep else ():
        value = run.figures[METRIC][figure]
        assert isinstance(value, float)
        found.setdefault(run.method, {})[run.order, run.seed] = value
    return found


def tuned_label(method: str) -> str:
    return method if method == NOTHING_TO_TUNE else f"{method}-{TUNED}"


def _mean(values: dict[tuple[int, int], float]) -> float:
    return fmean(values.values())


def _ranks(means: dict[str, float]) -> dict[str, int]:
    return {method: place for place, method in enumerate(sorted(means, key=lambda one: -means[one]), 1)}


def rankings(finals: Finals, forgotten: Finals) -> str:
    methods = sorted(method for method in method_names() if tuned_label(method) in finals)
    before = {method: _mean(finals[method]) for method in methods}
    after = {method: _mean(finals[tuned_label(method)]) for method in methods}
    ranks, tuned_ranks = _ranks(before), _ranks(after)
    changes = {
        method: _differences(finals[method], finals[f"{method}-{TUNED}"])
        for method in methods
        if method != NOTHING_TO_TUNE
    }
    adjusted = dict(zip(changes, holm([flip_test(change) for change in changes.values()]), strict=True))
    rows = []
    for method in sorted(methods, key=tuned_ranks.__getitem__):
        row = [method, f"{before[method]:.1f}", f"{after[method]:.1f}"]
        if method in changes:
            change = estimate_of(changes[method])
            row += [f"{change.mean:+.1f} [{span(mean_interval(change))}]", f"{adjusted[method]:.3f}"]
        else:
            row += ["nothing to tune", "–"]
        lost = [f"{_mean(forgotten[label]):.1f}" for label in (method, tuned_label(method))]
        rows.append([*row, f"{ranks[method]} → {tuned_ranks[method]}", " → ".join(lost)])
    tau = kendalltau([before[method] for method in methods], [after[method] for method in methods]).statistic
    headers = ["method", "before", "after", "difference", "p (Holm)", "rank", "forgetting"]
    return f"{_table(rows, headers)}\n\nKendall's τ of the two rankings: {tau:.2f}."


def _differences(before: dict[tuple[int, int], float], after: dict[tuple[int, int], float]) -> list[float]:
    return [after[key] - before[key] for key in before if key in after]


def _costs(sweep: SweepResult, finals: Finals) -> str:
    labels = {tuned_label(method): method for method in method_names()}
    costs = {labels[label]: cost for label, cost in mean_costs(sweep.runs).items() if label in labels}
    scores = {method: _mean(finals[tuned_label(method)]) for method in costs}
    points = cost_points(costs, scores)
    write_text(RESULTS / "frontier.svg", frontier_dots(points, "final average of exact match, %"))
    hours, parameters = (frontier(panel) for panel in points.values())
    rows = [
        [
            method,
            f"{scores[method]:.1f}",
            f"{3600 * (cost.device_hours or 0):.1f}",
            f"{cost.parameters:,}",
            ", ".join(name for name, best in (("time", hours), ("parameters", parameters)) if method in best),
        ]
        for method, cost in sorted(costs.items(), key=lambda one: -scores[one[0]])
    ]
    return _table(rows, ["method", "final average", "device seconds", "parameters", "on the frontier of"])


def _capacity(compared: SweepResult, wide: SweepResult, finals: Finals) -> str:
    costs = mean_costs([*compared.runs, *wide.runs])
    wider = final_averages(wide, "final_average")
    rows = []
    for method in sorted(method_names()):
        label, broad = tuned_label(method), f"{method}-{WIDE}"
        row = [method, f"{_mean(finals[label]):.1f}", f"{costs[label].parameters:,}"]
        shown = broad if broad in wider else label
        values = wider.get(broad, finals[label])
        pairs = "" if shown == label else f"{fmean(_differences(finals[label], values)):+.1f}"
        rows.append([*row, f"{_mean(values):.1f}", f"{costs[shown].parameters:,}", pairs])
    headers = ["method", "rank 8 a bank", "parameters", "equal parameters", "parameters", "difference"]
    return _table(rows, headers)


def _tuning_table() -> str:
    rows = []
    for method in tuned_methods():
        trials = studies(tuning(method).folder)["streams"]
        minutes = sum(trial.duration.total_seconds() for trial in trials if trial.duration) / 60
        values = ", ".join(
            f"{key.removeprefix('tasks.*.')} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in chosen(method).items()
        )
        scores = [trial.value for trial in trials if trial.value is not None]
        rows.append([method, values, f"{min(scores):.1f} to {max(scores):.1f}", f"{minutes:.1f}"])
    total = sum(float(row[-1]) for row in rows)
    table = _table(rows, ["method", "chosen", "validation score of the trials", "minutes of one core"])
    return f"{table}\n\n{total:.0f} minutes of one core in all."


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
