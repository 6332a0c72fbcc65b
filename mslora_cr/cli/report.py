"""`mslora-cr report`, `mslora-cr compare` and `mslora-cr analyze`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mslora_cr.cli.common import add_command, add_overrides, add_trust, count, quieten, run_config
from mslora_cr.utils.errors import UserError


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "report",
        "write report.html and report.md to a run's results folder",
        "mslora-cr report demo",
        "mslora-cr report checkpoints/RUN",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration or run folder")
    add_overrides(parser)
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from mslora_cr.reporting.report import write_report

    config = run_config(args.target, args.overrides)
    print(f"report: {write_report(config.run_dir, config.results_run_dir, config)}")
    return 0


def add_compare(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "compare",
        "compare runs on the same questions with paired significance tests, per task and overall",
        "mslora-cr compare checkpoints/mslora_cr checkpoints/sequential",
        "mslora-cr compare a.yaml b.yaml --at own --output comparison.json",
        "mslora-cr compare RUN results/RUN/served/NAME --page comparison.html     # a served model and ours",
        "mslora-cr compare results/RUN results/RUN/routed     # the cost of not knowing the task ID",
        "mslora-cr compare published/RUN_A published/RUN_B     # answer files alone",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="configuration, run folder or results folder of a run, or a folder of answer files alone "
        "(TASK/answer-file.jsonl, as published); the first of at least two is the baseline",
    )
    parser.add_argument(
        "--at",
        choices=("final", "own"),
        default="final",
        help="which scores to compare. final: every task after the last one (default; needs evaluate --stages final "
        "or seen); own: each task right after it was learned, as published",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the results as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="also write a page with the runs side by side")
    add_trust(parser)
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from mslora_cr.analysis.compare import compare, render_comparison
    from mslora_cr.reporting.capacity import rendered_ranks

    if len(args.runs) < 2:
        raise UserError("compare needs at least two runs, the baseline first")
    folders = [_results_folder(target) for target in args.runs]
    labels = _labels(folders)
    comparison = compare(dict(zip(labels, folders, strict=True)), args.at)
    print(render_comparison(comparison))
    runs = [(label, _run_folder(run), folder) for label, run, folder in zip(labels, args.runs, folders, strict=True)]
    if ranks := rendered_ranks(runs):
        print(ranks)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        comparison.write(args.output)
    if args.page:
        from mslora_cr.reporting.comparison import write_comparison

        print(f"page: {write_comparison(runs, args.page)}")
    return 0


def add_analyze(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "analyze",
        "explain a run's results in its report: similarity and effective rank of the banks, leave-one-bank-out "
        "contributions, changed answers",
        "mslora-cr analyze demo",
        "mslora-cr analyze checkpoints/with_beta --against checkpoints/without_beta",
        "mslora-cr analyze checkpoints/RUN --questions 0     # no leave-one-bank-out evaluation",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration or run folder")
    add_overrides(parser)
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="runs whose effective ranks to show for comparison",
    )
    parser.add_argument(
        "--questions",
        type=count,
        metavar="N",
        help="questions per task for the leave-one-bank-out evaluation (default: 200; 0 skips it)",
    )
    parser.set_defaults(run=_analyze)


def _analyze(args: argparse.Namespace) -> int:
    quieten()
    from mslora_cr.analysis.analyze import QUESTIONS, analyze
    from mslora_cr.distributed.comm import rank
    from mslora_cr.distributed.launch import abort_together
    from mslora_cr.reporting.report import write_report

    config = run_config(args.target, args.overrides)
    others = [run_config(target) for target in args.against]
    with abort_together():
        path = analyze(config, others, QUESTIONS if args.questions is None else args.questions)
    if rank() == 0:
        print(f"analysis: {path}\nreport: {write_report(config.run_dir, config.results_run_dir, config)}")
    return 0


def _results_folder(target: Path) -> Path:
    """The results folder of a run, given by its configuration, its run folder or the results folder itself; a folder of
    answer files alone stands for itself."""
    from mslora_cr.analysis.answered import has_answers
    from mslora_cr.config.run_files import EVALUATION

    has_results = (target / EVALUATION).is_file() or has_answers(target)
    return target if has_results else run_config(target).results_run_dir


def _run_folder(target: Path) -> Path | None:
    """The run folder of a target as for `_results_folder`; None for a folder of results."""
    return run_config(target).run_dir if _results_folder(target) != target else None


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or full paths if names repeat."""
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise UserError(f"the same run was given twice: {', '.join(labels)}")
    return labels
