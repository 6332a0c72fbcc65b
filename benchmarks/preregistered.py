"""The sweep of docs/explanation/preregistration.md: what the two penalties do, one by one, at the published rank.

    mslora-cr demo                                          # makes the tiny model and the stream, once
    python -m benchmarks.preregistered --jobs 2             # 300 runs, 40 minutes of one core in all; resumes
    python -m benchmarks.preregistered --found results/preregistered/sweep.json     # the tests alone; files are joined

Every setting, outcome, contrast and test here was written down in that page before the first run. `sweep.json` has all
figures of the runs, `tests.json` what the tests say of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

from tabulate import tabulate

from mslora_cr.config.load import load_config
from mslora_cr.distributed.pool import devices
from mslora_cr.reporting.sweep_result import RESULT, SweepResult
from mslora_cr.statistics.interval import span
from mslora_cr.statistics.intervals import estimate_of, mean_interval
from mslora_cr.statistics.significance import flip_test, holm
from mslora_cr.sweep import SweepRun, describe, run_sweep
from mslora_cr.utils.files import write_text

SEEDS = range(1, 31)
STREAMS = {"same modality": ("derm", "HAM"), "other modality": ("pathvqa", "slake-vqarad")}
"""By name, a stream of two tasks."""
PENALTIES = {
    "none": ("alpha=0", "beta=0"),
    "orthogonality": ("alpha=0", "beta=0.01"),
    "angle": ("alpha=0.1", "beta=0", "distance=cosine"),
    "angle_and_orthogonality": ("alpha=0.1", "beta=0.01", "distance=cosine"),
    "published": ("alpha=0.1", "beta=0.01"),
}
SETTINGS = ("method=mslora_cr", "lora.rank=64", "lora.alpha=64", "evaluation.banks_by=all")
TASK = "{{name: {name}, epochs: 1, batch_size: 16, learning_rate: 3e-3}}"
PRIMARY = "angle beside orthogonality"
CONTRASTS = {
    PRIMARY: ("angle_and_orthogonality", "orthogonality"),
    "angle alone": ("angle", "none"),
    "orthogonality alone": ("orthogonality", "none"),
    "published beside orthogonality": ("published", "orthogonality"),
}
"""What a setting has more than another."""
METRIC = "exact"
AVERAGE = "both tasks at the end"
OUTCOMES = (AVERAGE, "second task at the end", "change of the first task")


class Test(NamedTuple):
    """A paired test of two settings over seeds: differences in points."""

    stream: str
    contrast: str
    outcome: str
    differences: list[float]

    @property
    def primary(self) -> bool:
        return (self.contrast, self.outcome) == (PRIMARY, AVERAGE)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preregistered", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--found", type=Path, nargs="+", metavar="SWEEP.json", help="test these results together instead of running any"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="default: 1 to 30")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one per core)")
    parser.add_argument("--config", default="sweep", help="the base configuration (default: sweep)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < 2:
        parser.error("--seeds: name at least two; one has no spread")
    if args.found is None:
        runs = plan(args.config, args.overrides, args.seeds)
        used = devices(runs[0].config.model.device, args.jobs)
        print(describe(runs[:1], used).splitlines()[-3], f"{len(runs)} runs", sep="\n", flush=True)
        args.found = [run_sweep(runs, used).with_name(RESULT)]
    rows = results(joined([SweepResult.read(path) for path in args.found]))
    write_text(args.found[0].with_name("tests.json"), json.dumps(rows, indent=2) + "\n")
    print(render(rows))
    return rows


def plan(config: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[SweepRun]:
    """The runs, seed by seed, so that what is there after any time has complete pairs."""
    base = load_config(config, overrides)
    places = [f"output_dir={base.output_dir}/preregistered", f"results_dir={base.results_dir}/preregistered"]
    found = []
    for seed in seeds:
        for order, tasks in enumerate(STREAMS.values()):
            for name, penalties in PENALTIES.items():
                stream = f"tasks=[{', '.join(TASK.format(name=task) for task in tasks)}]"
                terms = [f"regularization.{penalty}" for penalty in penalties]
                settings = [*SETTINGS, f"run={name}-stream{order}-seed{seed}", f"seed={seed}", stream, *terms]
                found.append(SweepRun(name, order, seed, load_config(config, [*overrides, *places, *settings])))
    return found


def joined(parts: Sequence[SweepResult]) -> SweepResult:
    """The runs of several sweeps, of other seeds each, as of one."""
    runs = {run.run: run for part in parts for run in part.runs}
    return parts[0].model_copy(update={"runs": [*runs.values()], "seeds": sorted({run.seed for run in runs.values()})})


def results(found: SweepResult) -> list[dict[str, Any]]:
    """Every registered test, the primary ones first; p-values are corrected within either family."""
    tests = sorted(_tests(found), key=lambda test: not test.primary)
    rows = [_row(test) for test in tests]
    for primary in (True, False):
        family = [row for row in rows if row["primary"] is primary]
        for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_adjusted"] = adjusted
    return rows


def _tests(found: SweepResult) -> list[Test]:
    streams = {",".join(tasks): name for name, tasks in STREAMS.items()}
    names = {int(order): streams[",".join(tasks)] for order, tasks in found.orders.items()}
    values: dict[tuple[int, str, int], Mapping[str, float]] = {}
    for run in found.runs:
        values[run.order, run.method, run.seed] = _outcomes(run.figures[METRIC], found.orders[str(run.order)][-1])
    return [
        Test(stream, contrast, outcome, _differences(values, order, *pair, outcome, found.seeds))
        for order, stream in names.items()
        for contrast, pair in CONTRASTS.items()
        for outcome in OUTCOMES
    ]


def _outcomes(figures: Mapping[str, Any], last: str) -> dict[str, float]:
    values = figures["final_average"], figures["final"][last], figures["backward_transfer"]
    return dict(zip(OUTCOMES, values, strict=True))


def _differences(
    values: Mapping[tuple[int, str, int], Mapping[str, float]],
    order: int,
    more: str,
    less: str,
    outcome: str,
    seeds: Sequence[int],
) -> list[float]:
    pairs = [(values.get((order, more, seed)), values.get((order, less, seed))) for seed in seeds]
    return [first[outcome] - second[outcome] for first, second in pairs if first and second]


def _row(test: Test) -> dict[str, Any]:
    """Student's t interval, and the sign-flip test over seeds."""
    total = estimate_of(test.differences)
    return {
        "primary": test.primary,
        "stream": test.stream,
        "contrast": test.contrast,
        "outcome": test.outcome,
        "pairs": len(test.differences),
        "difference": total.mean,
        "deviation": stdev(test.differences),
        "interval": mean_interval(total),
        "p": flip_test(test.differences),
    }


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tests as Markdown tables, the primary ones first."""
    parts = []
    for title, primary in (("Primary", True), ("Secondary", False)):
        lines = [
            {
                "stream": row["stream"],
                "contrast": row["contrast"],
                "outcome": row["outcome"],
                "pairs": row["pairs"],
                "difference": f"{row['difference']:+.2f} [{span(row['interval'], 2)}]",
                "p": f"{row['p']:.3f}",
                "p (Holm)": f"{row['p_adjusted']:.3f}",
            }
            for row in rows
            if row["primary"] is primary
        ]
        parts.append(f"{title}\n\n" + tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
