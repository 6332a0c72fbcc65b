"""What the published scores of MSLoRA-CR say, against one LoRA per task: per task and over tasks, with tests.

    python -m benchmarks.published                          # from the published scores alone: tasks as a sample
    python -m benchmarks.published --answers FOLDER         # and per task, from the published files in FOLDER/RUN

`pathvqa` is left out of the first part: its scores, to the last digit, and its answer file are the same in all runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mslora_cr.evaluation.compare import compare, render_comparison
from mslora_cr.evaluation.intervals import estimate_of, mean_interval, span
from mslora_cr.evaluation.significance import sign_test, t_test
from mslora_cr.reporting.run_record import load_published_scores
from mslora_cr.reporting.style import TITLES

BASELINE, SHARED = "each", "pathvqa"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--answers", type=Path, metavar="FOLDER", help="folder of RUN/TASK/answer-file.jsonl")
    args = parser.parse_args(argv)
    runs = load_published_scores()
    rows = [
        _row(runs[kind].title, title, _differences(runs[BASELINE].scores, runs[kind].scores, metric))
        for kind in runs
        if kind != BASELINE
        for metric, title in TITLES.items()
    ]
    print(tabulate(rows, headers="keys", tablefmt="github"))
    if args.answers:
        folders = {kind: args.answers / run.run for kind, run in runs.items() if (args.answers / run.run).is_dir()}
        print("\n" + render_comparison(compare(folders, "own")))
    return rows


def _differences(
    before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], metric: str
) -> dict[str, float]:
    tasks = [task for task in before if task != SHARED and metric in before[task] and metric in after.get(task, {})]
    return {task: after[task][metric] - before[task][metric] for task in tasks}


def _row(run: str, metric: str, differences: dict[str, float]) -> dict[str, Any]:
    values = list(differences.values())
    total = estimate_of(values)
    wins, losses = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return {
        "run": run,
        "metric": metric,
        "differences": ", ".join(f"{task} {value:+.2f}" for task, value in differences.items()),
        "mean": f"{total.mean:+.2f} [{span(mean_interval(total))}]",
        "p (t)": f"{t_test(total):.3f}",
        "won, lost": f"{wins}, {losses}",
        "p (signs)": f"{sign_test(wins, losses):.3f}",
    }


if __name__ == "__main__":
    main()
