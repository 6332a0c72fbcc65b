"""`mslora-cr report`, `mslora-cr compare`, `mslora-cr submit` and `mslora-cr analyze`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from mslora_cr.cli.common import add_command, add_overrides, add_trust, count, import_libraries, run_config
from mslora_cr.utils.errors import UserError


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "report",
        "write report.html and report.md to a run's results folder",
        "mslora-cr report demo",
        "mslora-cr report checkpoints/RUN",
        "mslora-cr report finetune_lora_each --answers published/RUN     # answer files alone, with their pictures",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration or run folder")
    add_overrides(parser)
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FOLDER",
        help="a folder of answer files alone (TASK/answer-file.jsonl, as published) of the configuration's tasks: they "
        "are scored and shown in place of the run's, with the pictures that the data root has",
    )
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from mslora_cr.reporting.report import write_report

    config = run_config(args.target, args.overrides)
    if args.answers is None:
        print(f"report: {write_report(config.run_dir, config.results_run_dir, config)}")
        return 0
    from mslora_cr.analysis.given_answers import score_given

    folder = score_given(config, args.answers)
    print(f"report: {write_report(folder, folder, config)}")
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
        "mslora-cr compare ours.zip theirs.zip others.zip --page board.html     # archives of `mslora-cr submit`",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="configuration, run folder or results folder of a run, a folder of answer files alone "
        "(TASK/answer-file.jsonl, as published), or an archive of `mslora-cr submit`, whose scores are computed again "
        "from its answers; the first of at least two is the baseline",
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
    if len(args.runs) < 2:
        raise UserError("compare needs at least two runs, the baseline first")
    with ExitStack() as stack:
        return _compare_runs([_given_run(target, stack) for target in args.runs], args)


def _compare_runs(compared: Sequence[_Compared], args: argparse.Namespace) -> int:
    from mslora_cr.analysis.compare import compare, render_comparison
    from mslora_cr.reporting.capacity import rendered_ranks

    folders = [one.results for one in compared]
    labels = _labels([one.given for one in compared])
    comparison = compare(dict(zip(labels, folders, strict=True)), args.at)
    print(render_comparison(comparison))
    runs = [(label, one.run, one.results) for label, one in zip(labels, compared, strict=True)]
    if ranks := rendered_ranks(runs):
        print(ranks)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        comparison.write(args.output)
    if args.page:
        from mslora_cr.reporting.comparison import write_comparison

        print(f"page: {write_comparison(runs, args.page)}")
    return 0


def add_submit(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "submit",
        "pack a run's answers, scores, configuration and cost as one archive for a leaderboard",
        "mslora-cr submit RUN --output ours.zip",
        "mslora-cr compare ours.zip theirs.zip --page board.html",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration or run folder of an evaluated run")
    add_overrides(parser)
    parser.add_argument("--routed", action="store_true", help="pack the answers without task IDs (--banks-by routed)")
    parser.add_argument("--output", type=Path, metavar="FILE.zip", help="the archive (default: RUN.zip)")
    parser.set_defaults(run=_submit)


def _submit(args: argparse.Namespace) -> int:
    from mslora_cr.evaluation.schemas import ROUTED
    from mslora_cr.reporting.submission import write_submission

    config = run_config(args.target, args.overrides)
    output = args.output or Path(f"{config.run}.zip")
    if output.suffix != ".zip":
        raise UserError(f"--output {output}: the archive's name ends in .zip")
    results = config.results_run_dir / ROUTED if args.routed else config.results_run_dir
    print(f"archive: {write_submission(config, results, output)}")
    print("it holds questions, true answers and the model's answers: does your data's licence let you pass them on?")
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
    parser.set_defaults(run=_analyze, parallel=True)


def _analyze(args: argparse.Namespace) -> int:
    import_libraries()
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


class _Compared(NamedTuple):
    """What a run to compare is read from.

    Attributes:
        given: The run's name on the command line.
        run: The run folder, where there is one.
        results: The results folder.
    """

    given: Path
    run: Path | None
    results: Path


def _given_run(target: Path, stack: ExitStack) -> _Compared:
    """Return a run, given by its configuration, its run folder, its results folder, a folder of answer files alone, or
    an archive, which is unpacked until the stack is left.
    """
    from mslora_cr.analysis.answered import has_answers
    from mslora_cr.config.run_files import EVALUATION

    if target.suffix == ".zip":
        from mslora_cr.reporting.submission import open_submission

        folder = open_submission(target, Path(stack.enter_context(TemporaryDirectory(prefix="mslora-cr-"))))
        return _Compared(target.with_suffix(""), folder, folder)
    if (target / EVALUATION).is_file() or has_answers(target):
        return _Compared(target, None, target)
    config = run_config(target)
    return _Compared(config.results_run_dir, config.run_dir, config.results_run_dir)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, or full paths if names repeat."""
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise UserError(f"the same run was given twice: {', '.join(labels)}")
    return labels
