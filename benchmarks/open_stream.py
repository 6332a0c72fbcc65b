"""The sweep of docs/explanation/results-open.md: methods on the open stream with the small base, tuned alike.

    mslora-cr data prepare open --raw downloads/open --root data/open_small --most 400 100
    mslora-cr model make open_small --raw downloads/pretraining
    python -m benchmarks.open_stream --jobs 1               # tunes, trains, answers, routes, tests; resumes

Every setting, outcome and test here was written down in docs/explanation/preregistration-open.md before the first run.
`sweep.json` has all figures of the task-aware runs, `tables.md` every table of the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from tabulate import tabulate

from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.config.load import load_config
from mslora_cr.distributed.pool import devices
from mslora_cr.evaluation.results import required_evaluation
from mslora_cr.evaluation.routed import evaluate_routed
from mslora_cr.evaluation.schemas import ROUTED, ROUTING, Routing
from mslora_cr.methods.base import needs_task
from mslora_cr.metrics.by_class import BALANCED
from mslora_cr.reporting.sweep_result import RESULT, Outcome, SweepResult
from mslora_cr.statistics.interval import span
from mslora_cr.statistics.intervals import estimate_of, mean_interval
from mslora_cr.statistics.significance import flip_test, holm
from mslora_cr.stream.orders import task_orders
from mslora_cr.sweep import SweepRun, describe, run_sweep
from mslora_cr.tuning.space import read_space
from mslora_cr.tuning.study import Plan, best_trial, studies, tune
from mslora_cr.utils.files import write_text

FOLDER = "open_stream"
SEEDS, ORDERS = (1, 2, 3), 2
RATE = "tasks.*.learning_rate"
RATES = {"low": 4e-3, "high": 2e-2, "log": True}
SPACES: Mapping[str, Mapping[str, Any]] = {
    "mslora_cr": {"regularization.alpha": [0.01, 0.1, 1.0], "regularization.beta": [0.001, 0.01, 0.1]},
    "sequential": {},
    "replay": {"replay.share": [0.25, 0.5]},
    "ewc": {"ewc.strength": {"low": 1.0, "high": 1e4, "log": True}},
    "incremental": {},
    "each": {},
}
"""What is tuned of each method, beside the learning rate of all tasks."""
SETTINGS = ("tasks.*.samples=240", "tasks.*.epochs=4", "tasks.*.batch_size=8")
TRIALS, TUNING_SEED, VALIDATION = 4, 101, 0.25
TUNING_TASKS = ("CXP-by-patient", "HAM10000")
"""The tasks of the trials, trained in the other order, because `tune` never uses the file's own."""
METRIC = "exact"
PRIMARY = ("mslora_cr", "incremental", "final_average")
SECONDARY = (
    ("mslora_cr", "incremental", "backward_transfer"),
    ("ewc", "sequential", "final_average"),
    ("ewc", "sequential", "backward_transfer"),
    ("replay", "sequential", "final_average"),
    ("replay", "sequential", "backward_transfer"),
    ("mslora_cr", "each", "final_average"),
)
"""Contrasts: a method, another one, and the figure of `sweep.json` that is compared."""
FORMATS = {"Tuned": ".2g", "Primary contrast": ".3f", "Secondary contrasts": ".3f"}
"""Of the numbers in a table; `.1f` elsewhere."""
SUBGROUPS = ("HAM10000", ("sex", "age"))


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.open_stream", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", default="open_small", help="the base configuration (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="default: 1 2 3")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one per core)")
    parser.add_argument("--trials", type=int, default=TRIALS, metavar="N", help="of each method (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args(argv)
    used = devices(load_config(args.config, args.overrides).model.device, args.jobs)
    tuned = tune_all(args.config, args.overrides, args.trials, used)
    runs = plan(args.config, args.overrides, tuned, args.seeds)
    print(describe(runs, used), flush=True)
    result = run_sweep(runs, used).with_name(RESULT)
    routed = [run for run in runs if needs_task(run.config)]
    for run in routed:
        evaluate_routed(run.config, "final")
    text = report(SweepResult.read(result), runs, routed, tuned)
    write_text(result.with_name("tables.md"), text + "\n")
    print(text)
    return text


def tune_all(
    config: str, overrides: Sequence[str], trials: int, used: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """The chosen values of every method, by key: `mslora-cr tune` with the same budget for each."""
    root = Path(load_config(config, overrides).output_dir) / FOLDER / "tuning"
    root.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, dict[str, Any]] = {}
    for method, keys in SPACES.items():
        space = root / f"{method}.yaml"
        write_text(space, yaml.safe_dump({RATE: RATES, **keys}))
        settings = (
            f"run={method}",
            f"method={method}",
            f"output_dir={root}",
            f"tasks=[{','.join(TUNING_TASKS)}]",
            *SETTINGS,
        )
        found = Plan(
            Path(config),
            (*overrides, *settings),
            read_space(space),
            trials,
            seeds=(TUNING_SEED,),
            share=VALIDATION,
        )
        tune(found, used)
        best = best_trial(studies(found.folder)["streams"])
        assert best is not None, "tune refuses a study without a finished trial"
        chosen[method] = dict(best.params)
    return chosen


def plan(
    config: str, overrides: Sequence[str], tuned: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> list[SweepRun]:
    """The runs, seed by seed, so that what is there after any time has complete pairs."""
    base = load_config(config, overrides)
    places = [f"output_dir={base.output_dir}/{FOLDER}", f"results_dir={base.results_dir}/{FOLDER}"]
    orders = task_orders([task.name for task in base.tasks], ORDERS)
    return [
        SweepRun(
            method,
            order,
            seed,
            load_config(
                config,
                [
                    *overrides,
                    *places,
                    f"run={method}-order{order}-seed{seed}",
                    f"method={method}",
                    f"seed={seed}",
                    *SETTINGS,
                    *(f"{key}={value}" for key, value in values.items()),
                    f"tasks=[{','.join(tasks)}]",
                ],
            ),
        )
        for seed in seeds
        for order, tasks in enumerate(orders)
        for method, values in tuned.items()
    ]


def report(
    found: SweepResult, runs: Sequence[SweepRun], routed: Sequence[SweepRun], tuned: Mapping[str, Mapping[str, Any]]
) -> str:
    """Every table of the page, as Markdown."""
    parts = {
        "Tuned": [{"method": method, **values} for method, values in tuned.items()],
        "Methods (exact match)": [_method(name, found.runs) for name in tuned],
        "Primary contrast": tests(found.runs, [PRIMARY]),
        "Secondary contrasts": tests(found.runs, SECONDARY),
        "Closed questions after the last task": list(_closed(runs)),
        "Subgroups of HAM10000": list(_subgroups(runs)),
        "Without task IDs": list(_routed(routed)),
    }
    tables = {
        name: tabulate(rows, headers="keys", tablefmt="github", floatfmt=FORMATS.get(name, ".1f"))
        for name, rows in parts.items()
    }
    return "\n\n".join(f"{name}\n\n{table}" for name, table in tables.items())


def _method(name: str, runs: Sequence[Outcome]) -> dict[str, Any]:
    of_method = [run for run in runs if run.method == name]
    row: dict[str, Any] = {"method": name, "runs": len(of_method)}
    for figure in ("final_average", "average_incremental_accuracy", "forgetting", "backward_transfer"):
        row[figure.replace("_", " ")] = _spread([_figure(run, figure) for run in of_method])
    row["training, s"] = fmean(run.seconds for run in of_method)
    row["parameters"] = max((run.parameters or 0) for run in of_method)
    return row


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _figure(run: Outcome, name: str) -> float:
    value = run.figures[METRIC][name]
    assert isinstance(value, float), f"{run.run} has no {name}"
    return value


def tests(runs: Sequence[Outcome], contrasts: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Paired differences at the same order and seed: Student's t interval, sign-flip test, Holm's correction."""
    rows: list[dict[str, Any]] = []
    for more, less, figure in contrasts:
        values = {(run.method, run.order, run.seed): _figure(run, figure) for run in runs}
        differences = [
            value - values[less, order, seed]
            for (method, order, seed), value in values.items()
            if method == more and (less, order, seed) in values
        ]
        total = estimate_of(differences)
        rows.append(
            {
                "contrast": f"{more} − {less}",
                "figure": figure.replace("_", " "),
                "pairs": len(differences),
                "difference": f"{total.mean:+.2f} [{span(mean_interval(total), 2)}]",
                "p": flip_test(differences),
            }
        )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row.update({"p": f"{row['p']:.3f}", "p (Holm)": f"{adjusted:.3f}"})
    return rows


def _clinical(run: SweepRun, task: str) -> Clinical:
    """A task's figures after the last stage."""
    cell = required_evaluation(run.results).last_cell(task)
    assert cell is not None, "a sweep evaluates every task after the last stage"
    return Clinical.read((run.results / cell.answers).with_name(CLINICAL))


def _closed(runs: Sequence[SweepRun]) -> Iterator[dict[str, Any]]:
    """Accuracy of closed questions beside guessing; and by text of the question, since kinds of questions have other
    answers, balanced accuracy and AUROC averaged over classes. In percent, means over runs."""
    for task in [task.name for task in runs[0].config.tasks]:
        for method in dict.fromkeys(run.method for run in runs):
            measured = [_clinical(run, task) for run in runs if run.method == method]
            closed = [one.closed for one in measured if one.closed is not None]
            if not closed:
                continue
            majority, hindsight = closed[0].guessing.majority, closed[0].guessing.hindsight
            texts = [text for one in measured for text in one.by_question if len(text.classes) > 1]
            areas = [fmean(found) for text in texts if (found := [of.auroc.value for of in text.by_class if of.auroc])]
            balanced = [text.figures[BALANCED].value for text in texts]
            yield {
                "task": task,
                "method": method,
                "questions": closed[0].questions,
                "most frequent answer": 100 * (hindsight if majority is None else majority),
                "accuracy": 100 * fmean(one.guessing.score for one in closed),
                "runs above it": sum(one.guessing.above for one in closed),
                "balanced accuracy": _percent(balanced),
                "guessing, balanced": _percent([1 / len(text.classes) for text in texts]),
                "AUROC": _percent(areas),
            }


def _percent(shares: Sequence[float]) -> float | None:
    """Return the mean in percent; None where nothing is asked often enough."""
    return 100 * fmean(shares) if shares else None


def _subgroups(runs: Sequence[SweepRun]) -> Iterator[dict[str, Any]]:
    """Accuracy of closed questions by group of patients, mean over runs, in percent."""
    task, attributes = SUBGROUPS
    for method in dict.fromkeys(run.method for run in runs):
        found = [_clinical(run, task).subgroups for run in runs if run.method == method]
        for attribute in attributes:
            for group in dict.fromkeys(name for one in found if attribute in one for name in one[attribute].groups):
                groups = [one[attribute].groups[group] for one in found if attribute in one]
                scores = [of.score.value for of in groups if of.score is not None]
                if scores:
                    guess = groups[0].guess
                    yield {
                        "method": method,
                        "attribute": attribute,
                        "group": group,
                        "questions": groups[0].questions,
                        "best constant answer": None if guess is None else 100 * guess,
                        "accuracy": 100 * fmean(scores),
                    }


def _routed(runs: Sequence[SweepRun]) -> Iterator[dict[str, Any]]:
    """The final average with and without the task, and the router's accuracy."""
    for method in dict.fromkeys(run.method for run in runs):
        given, alone, accuracy = list[float](), list[float](), list[float]()
        for run in (run for run in runs if run.method == method):
            folder = run.results / ROUTED
            for place, values in ((run.results, given), (folder, alone)):
                matrix = required_evaluation(place).matrix("exact match score")
                assert matrix is not None, "every task has an exact match score"
                values.append(matrix.final_average())
            accuracy.append(Routing.read(folder / ROUTING).stages[-1].accuracy or 0.0)
        yield {
            "method": method,
            "given the task": _spread(given),
            "routed": _spread(alone),
            "router": _spread(accuracy),
        }


if __name__ == "__main__":
    main()
