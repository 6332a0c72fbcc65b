"""The sweep of docs/explanation/preregistration-tuned.md: every method tuned on the same budget, then compared.

    mslora-cr demo                                          # makes the tiny model and the stream, once
    python -m benchmarks.tuned_sweep --jobs 1               # tunes, then runs three sweeps; resumes

Trials see validation questions of a seed and an order that no sweep reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution

from mslora_cr.config.methods import method_names
from mslora_cr.distributed.pool import devices
from mslora_cr.sweep import SweepRun, plan_sweep, run_sweep
from mslora_cr.tuning.space import Space, read_space
from mslora_cr.tuning.study import Plan, best_trial, studies, tune

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
EQUAL_PARAMETERS = ("lora.rank=24", "lora.alpha=24")
CHECKPOINTS, RESULTS = Path("checkpoints/tuned_sweep"), Path("results/tuned_sweep")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuned_sweep", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one per core)")
    args = parser.parse_args(argv)
    used = devices("cpu", args.jobs)
    started = time.monotonic()
    for method in tuned_methods():
        tune(tuning(method), used)
        print(f"{time.monotonic() - started:.0f} s: {method} {chosen(method)}", flush=True)
    for name, runs in sweeps().items():
        run_sweep(runs, used)
        print(f"{time.monotonic() - started:.0f} s: {name}, {len(runs)} runs", flush=True)


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
    both = [*_runs("compared", method_names(), {}), *_runs("compared", values, values, "tuned")]
    wide = {method: [*values[method], *EQUAL_PARAMETERS] for method in ONE_BANK}
    return {"compared": both, "equal_parameters": list(_runs("equal_parameters", ONE_BANK, wide, "rank24"))}


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


if __name__ == "__main__":
    main()
