"""What the published scores of MSLoRA-CR say, against one LoRA per task: per task and over tasks, with tests.

    python -m benchmarks.published                          # from the published scores alone
    python -m benchmarks.published --answers FOLDER         # and by question, from the published files in FOLDER/RUN

The first table has every published score with its interval: from the answers where they are there, and then also
whether they give the published `metrics.txt` again; else from score and count of questions, which gives none for F1.
The second takes the tasks for a sample. The third has every task that scores and counts alone tell something of:
closed accuracy and exact match, as if both runs had been asked different questions (Newcombe, "Interval Estimation for
the Difference Between Independent Proportions", Statistics in Medicine 1998, method 10). They were asked the same ones,
so the true interval is narrower, as far as both are right at the same questions. `pathvqa` is left out of these two:
its scores, to the last digit, and its answer file are the same in all runs. With answers, what the closed
accuracies hide and tests by question follow.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import ndtr
from tabulate import tabulate

from mslora_cr.analysis.compare import compare, render_comparison
from mslora_cr.clinical.asked import asked_answers
from mslora_cr.clinical.file import ClosedMeasured
from mslora_cr.clinical.measure import clinical_of
from mslora_cr.data.sources.catalog import TestRows, catalog
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import answer_groups, metrics_of, read_answers, render_metrics
from mslora_cr.metrics.measured import Measured
from mslora_cr.metrics.published import score_answers
from mslora_cr.reporting.render import chance
from mslora_cr.reporting.run_record import PublishedRun, load_published_scores
from mslora_cr.reporting.style import METRICS, TITLES
from mslora_cr.statistics.interval import Interval, bracketed, span
from mslora_cr.statistics.intervals import Estimate, estimate_of, mean_interval, percent, score_interval
from mslora_cr.statistics.significance import holm, sign_test, t_test

BASELINE, SHARED = "each", "pathvqa"
CLASSES = 8
"""Most classes of a task whose recall is shown, the most frequent ones."""
Scores = Mapping[str, Mapping[str, float]]
"""By task and metric, in percent."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--answers", type=Path, metavar="FOLDER", help="folder of RUN/TASK/answer-file.jsonl")
    args = parser.parse_args(argv)
    runs = load_published_scores()
    counts = {task: known.test_rows for task, known in catalog().items()}
    scores = [
        _scores(run, task, counts[task], args.answers / run.run / task if args.answers else None)
        for run in runs.values()
        for task in run.scores
    ]
    print(tabulate(scores, headers="keys", tablefmt="github", disable_numparse=True) + "\n")
    rows = [
        _row(runs[kind].title, TITLES[metric], _differences(runs[BASELINE].scores, runs[kind].scores, metric))
        for kind in runs
        if kind != BASELINE
        for metric in METRICS
    ]
    for row, adjusted in zip(rows, holm([row["p (t)"] for row in rows]), strict=True):
        row["p (t)"], row["p (t, Holm)"] = chance(row["p (t)"]), chance(adjusted)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    tasks = [
        {"run": runs[kind].title, "metric": TITLES[metric], **row}
        for kind in runs
        if kind != BASELINE
        for metric in ("closed", "exact")
        for row in _tasks(runs[BASELINE].scores, runs[kind].scores, metric, counts)
    ]
    for row, adjusted in zip(tasks, holm([row["p"] for row in tasks]), strict=True):
        row["p"], row["p (Holm)"] = chance(row["p"]), chance(adjusted)
    print("\n" + tabulate(tasks, headers="keys", tablefmt="github", disable_numparse=True))
    if args.answers:
        hidden = [row for run in runs.values() for row in hidden_by(run, args.answers)]
        print("\n" + tabulate(hidden, headers="keys", tablefmt="github", disable_numparse=True))
        folders = {kind: args.answers / run.run for kind, run in runs.items() if (args.answers / run.run).is_dir()}
        print("\n" + render_comparison(compare(folders, "own")))
    return scores + rows + tasks


def _scores(run: PublishedRun, task: str, count: TestRows, folder: Path | None) -> dict[str, Any]:
    """A run's scores of a task with their intervals, from the answers in a folder that has them."""
    questions = {"closed": count.closed, "exact": count.open + count.closed}
    row: dict[str, Any] = {"run": run.title, "task": task, "closed questions": count.closed, "open": count.open}
    ends = {
        metric: score_ends(score, questions[metric]) for metric, score in run.scores[task].items() if metric != "f1"
    }
    known = "–"
    if folder is not None and (folder / ANSWERS).is_file():
        answers = read_answers(folder / ANSWERS)
        found = score_answers(answers)
        ends = metrics_of(found, answer_groups(answers)).intervals
        ends = {metric: ends[name] for metric, name in METRICS.items() if name in ends}
        published = folder / "metrics.txt"
        same = published.is_file() and published.read_text(encoding="utf-8") == render_metrics(found)
        known = "as published" if same else "differs"
    for metric in METRICS:
        value = run.scores[task].get(metric)
        span_of = f" [{span(ends[metric])}]" if metric in ends else ""
        row[TITLES[metric]] = "–" if value is None else f"{value:.2f}{span_of}"
    return row | {"recomputed": known}


def hidden_by(run: PublishedRun, answers: Path) -> list[dict[str, Any]]:
    """By task with closed questions: what its accuracy hides, from the answer files of a run that are there."""
    rows = []
    for task in run.scores:
        path = answers / run.run / task / ANSWERS
        if not path.is_file():
            continue
        records = read_answers(path)
        said = [(row.prompt, str(row.text), str(row.gt), row.answer_type == "CLOSED") for row in records]
        closed = clinical_of(asked_answers(said, None), answer_groups(records)).closed
        if closed is not None:
            rows.append({"run": run.title, "task": task} | _hidden(closed))
    return rows


def _hidden(closed: ClosedMeasured) -> dict[str, str]:
    figures = {name: _percent(closed.figures.get(name)) for name in ("accuracy", "balanced accuracy")}
    by_class = sorted(closed.by_class, key=lambda one: -one.questions)[:CLASSES]
    recalls = [f"{one.name} {_percent(one.recall)}" for one in by_class]
    guessing = f"{100 * closed.guessing.hindsight:.1f}"
    return {
        **figures,
        "constant answer by question": guessing if closed.guessing.above else f"{guessing} (not above)",
        "recall": "; ".join(recalls),
    }


def _percent(figure: Measured | None) -> str:
    if figure is None:
        return "–"
    return f"{100 * figure.value:.1f}{bracketed(percent(figure.interval) if figure.interval else None)}"


def score_ends(score: float, questions: int) -> Interval:
    """Wilson's interval, in percent, of a share in percent of so many questions."""
    return percent(score_interval([_share(score / 100, questions)]))


def _share(share: float, questions: int) -> Estimate:
    variance = share * (1 - share) / (questions - 1)
    return Estimate(share, share, variance, questions - 1.0, questions, questions, questions, 1 / questions)


def _tasks(before: Scores, after: Scores, metric: str, counts: Mapping[str, TestRows]) -> list[dict[str, Any]]:
    """Each task's difference. Exact match of a task with closed questions alone is its closed accuracy."""
    found = []
    for task in _differences(before, after, metric):
        questions = counts[task].closed + (counts[task].open if metric == "exact" else 0)
        if metric == "exact" and not counts[task].open:
            continue
        shares = before[task][metric] / 100, after[task][metric] / 100
        low, high = unpaired_interval(*shares, questions)
        pooled = sum(shares) / 2
        error = (2 * pooled * (1 - pooled) / questions) ** 0.5
        found.append(
            {
                "task": task,
                "questions": questions,
                BASELINE: f"{before[task][metric]:.2f}",
                "run's": f"{after[task][metric]:.2f}",
                "difference": f"{100 * (shares[1] - shares[0]):+.2f} [{span((100 * low, 100 * high))}]",
                "p": float(2 * ndtr(-abs(shares[1] - shares[0]) / error)),
            }
        )
    return found


def unpaired_interval(before: float, after: float, questions: int) -> Interval:
    """Of the difference of two shares, of as many different questions each."""
    low, high = score_interval([_share(before, questions)])
    low_after, high_after = score_interval([_share(after, questions)])
    return (
        after - before - ((after - low_after) ** 2 + (high - before) ** 2) ** 0.5,
        after - before + ((high_after - after) ** 2 + (before - low) ** 2) ** 0.5,
    )


def _differences(before: Scores, after: Scores, metric: str) -> dict[str, float]:
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
        "won, lost": f"{wins}, {losses}",
        "p (signs)": chance(sign_test(wins, losses)),
        "p (t)": t_test(total),
    }


if __name__ == "__main__":
    main()
