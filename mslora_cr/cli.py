"""`mslora-cr`: the one command. Libraries that take seconds to import are imported by the command that needs them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import get_args

from mslora_cr import __version__
from mslora_cr.config import EvaluationConfig, StreamConfig
from mslora_cr.errors import UserError

EXTRAS = {"nltk": "eval", "tabulate": "eval", "matplotlib": "eval", "jinja2": "eval", "markupsafe": "eval"}
EXTRAS |= {"rouge_score": "eval", "deepspeed": "train", "h5py": "data", "bitsandbytes": "quantization"}
OVERRIDES = "override configuration values, e.g. lora.rank=32 tasks.pathvqa.epochs=1 'tasks.*.batch_size=8'"
OVERRIDE = re.compile(r"[A-Za-z_][\w.*+-]*=")
LISTS = ("--methods", "--seeds", "--against")
"""Options that take several words."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 on an error that the user can fix, reported in a few lines, 130 on Ctrl-C, 141 if
    nobody reads its output any more, as in `… | head`."""
    args = _parse(argv)
    import logging  # behind --help, which does not need it

    # It recommends more packages when PEFT looks for it, and float16 at every 8-bit layer of every forward pass.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"mslora-cr: error: {error}", file=sys.stderr)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        print(f"mslora-cr: error: {error}; finished work is kept", file=sys.stderr)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        missing = f"{error.name} is not installed; pip install -e '.[{extra}]' installs it"
        print(f"mslora-cr: error: {missing}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nmslora-cr: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 1


def _nobody_reads() -> bool:
    """Whether it is the reader of standard output that has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would complain when it ends
        return True
    return False


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with KEY=VALUE overrides anywhere after the configuration: argparse by itself accepts
    a list of positional arguments only in one piece, and adds them to an option's list."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    kept, behind_lists = _split(words)
    args, rest = parser.parse_known_args(kept)
    given = [*rest, *behind_lists]
    wrong = [word for word in given if "overrides" not in args or word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if "overrides" in args:  # later ones win, so they stay in the order of the command line
        given += args.overrides
        args.overrides = [word for word in words if word in given]
    return args


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are none of an option's list, though they stand behind it: overrides."""
    kept: list[str] = []
    overrides: list[str] = []
    option = ""
    for word in words:
        if word.startswith("-"):
            option = word
        (overrides if option in LISTS and OVERRIDE.match(word) else kept).append(word)
    return kept, overrides


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="mslora-cr",
        description="Continual learning for biomedical vision-language models: one LoRA bank per imaging task.",
        epilog=_examples(
            "mslora-cr demo",
            "mslora-cr train configs/finetune_mslora_cr_ortho.yaml --dry-run",
            "mslora-cr evaluate configs/finetune_mslora_cr_ortho.yaml --stages all",
            "mslora-cr report configs/finetune_mslora_cr_ortho.yaml",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("--version", action="version", version=f"mslora-cr {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_score(commands)
    _add_report(commands)
    _add_compare(commands)
    _add_analyze(commands)
    _add_sweep(commands)
    _add_data(commands)
    _add_model(commands)
    _add_bank(commands)
    return parser


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _command(commands: argparse._SubParsersAction, name: str, help: str, *examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        allow_abbrev=False,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=_examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=OVERRIDES)


def _config(args: argparse.Namespace) -> StreamConfig:
    from mslora_cr.config_file import load_config

    return load_config(args.config, args.overrides)


# --- demo ----------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "demo",
        "build a tiny model and a synthetic task stream, train and compare two methods on it, and write a report",
        "mslora-cr demo",
        "mslora-cr demo evaluation.batch_size=32",
    )
    _add_overrides(parser)
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr.demo import run_demo

    run_demo(args.overrides)
    return 0


# --- train ---------------------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "train",
        "train one bank per task of the stream; finished tasks are skipped and an interrupted one resumes",
        "mslora-cr train configs/demo.yaml --dry-run     # after `mslora-cr demo`",
        "mslora-cr train configs/finetune_mslora_cr_ortho.yaml training.per_device_train_batch_size=4",
        "mslora-cr train configs/finetune_mslora_cr_ortho.yaml --task derm",
        "mslora-cr train configs/demo.yaml run=ewc method=ewc ewc.strength=1e4    # methods: docs/methods.md",
        "torchrun --nproc_per_node 4 -m mslora_cr train configs/finetune_mslora_cr_ortho.yaml \\\n"
        "      training.deepspeed=configs/deepspeed/zero2.json",
    )
    _add_config(parser)
    parser.add_argument(
        "--task", metavar="NAME", help="train only this task; the banks it builds on must already exist"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, then exit"
    )
    parser.add_argument(
        "--force", action="store_true", help="resume in a run folder that was made with another configuration"
    )
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    _quieten()
    from mslora_cr.training import stream
    from mslora_cr.training.distributed import rank
    from mslora_cr.training.processes import stopping_together

    with stopping_together():
        if not args.dry_run:
            stream.train(config, only=args.task, force=args.force)
        elif rank() == 0:
            _print_plan(config, args.task, args.force)
    return 0


def _print_plan(config: StreamConfig, only: str | None, force: bool) -> None:
    """Print what `train` would do with these arguments.

    Raises:
        ConfigError, DataError, BankError: as `train` would.
    """
    import yaml

    from mslora_cr.training.stream import plan, tasks_to_train

    chosen = {task.name for task in tasks_to_train(config, only)}
    plans, trainable = plan(config)
    done = {item.task for item in plans if item.done}
    plans = [item for item in plans if item.task in chosen]
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print(f"run folder: {config.run_dir}\ntrainable parameters per bank: {trainable:,}\n")
    print(
        f"{'task':<16}{'modality':<14}{'records':>9}{'epochs':>8}{'batch':>14}{'steps':>8}"
        f"  {'frozen':>6}  penalties  state"
    )
    for item in plans:
        batch = f"{item.per_device_batch_size} × {item.accumulation_steps}"
        print(
            f"{item.task:<16}{item.modality:<14}{item.records:>9,}{item.epochs:>8g}{batch:>14}{item.steps:>8,}"
            f"  {len(item.frozen_banks):>6}  {'yes' if item.penalties else 'no':<9}  {'done' if item.done else 'to do'}"
        )
    for warning in _obstacles(config, only, force, done):
        print(f"\nwarning: {warning}")


def _obstacles(config: StreamConfig, only: str | None, force: bool, done: Collection[str]) -> Iterator[str]:
    """Why training would refuse to start, as far as the plan shows it."""
    from mslora_cr.runtime import base_digest
    from mslora_cr.training.ledger import Ledger
    from mslora_cr.training.stream import frozen_tasks, previous_task

    differences = Ledger.read(config).differences(config, base_digest(config))
    if differences and not force:
        yield (
            f"{config.run_dir} was made with another configuration ({differences}); "
            "without --force, training refuses to resume in it"
        )
    if only and only not in done:
        needed = frozen_tasks(config, config.task(only)) or previous_task(config, config.task(only))
        missing = [task.name for task in needed if task.name not in done]
        if missing:
            yield f"{only} builds on banks that are not trained yet: {', '.join(missing)}"


# --- evaluate, score, report ---------------------------------------------------------------------------------------


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "evaluate",
        "answer and score the test questions of every trained task; an interrupted evaluation resumes",
        "mslora-cr evaluate configs/demo.yaml",
        "mslora-cr evaluate configs/demo.yaml --stages all",
        "mslora-cr evaluate configs/demo.yaml --banks-by routed     # task ID not given",
        "mslora-cr evaluate configs/finetune_mslora_cr_ortho.yaml --banks checkpoints     # published ones",
    )
    _add_config(parser)
    parser.add_argument("--task", metavar="NAME", help="evaluate only this task")
    parser.add_argument(
        "--stages",
        choices=("own", "final", "seen", "all"),
        help="when each task is evaluated. own: right after it was learned, as published (default); final: after the "
        "last task (default if routed); seen: after its own and every later task; all: the full task × stage matrix, "
        "including the base model without banks (stage 0), as forward transfer needs it",
    )
    parser.add_argument(
        "--banks",
        type=Path,
        metavar="DIR",
        help="read the banks from published checkpoints or another run folder instead of this run's folder",
    )
    parser.add_argument(
        "--banks-by",
        choices=get_args(EvaluationConfig.model_fields["banks_by"].annotation),
        help="which banks answer a question of task t (default: evaluation.banks_by of the configuration). prefix: "
        "banks 1..t, as published; all: every bank trained so far; routed: task ID not given, a router predicts it for "
        "each question; results go to routed/",
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    if args.banks_by:
        args.overrides.append(f"evaluation.banks_by={args.banks_by}")
    config = _config(args)
    if args.task and config.evaluation.banks_by == "routed":
        raise UserError("--task cannot be combined with routed evaluation, which mixes the questions of all tasks")
    _quieten()
    from mslora_cr.chains import load_chain
    from mslora_cr.evaluation.evaluate import evaluate
    from mslora_cr.evaluation.routed import evaluate_routed
    from mslora_cr.training.distributed import rank
    from mslora_cr.training.processes import stopping_together

    with stopping_together():
        banks = load_chain(args.banks, config) if args.banks else None
        if config.evaluation.banks_by == "routed":
            path = evaluate_routed(config, args.stages or "final", banks)
        else:
            path = evaluate(config, args.stages or "own", args.task, banks)
    if rank() == 0:
        print(f"results: {path.parent}")
    return 0


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "score",
        "score an answer file with the published metrics",
        "mslora-cr score results/RUN/pathvqa/answer-file.jsonl --output scores/",
    )
    parser.add_argument(
        "answers",
        type=Path,
        metavar="ANSWERS.jsonl",
        help="answer file, one object per line with question_id, prompt, text, gt and answer_type",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for metrics and hit lists")
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    from mslora_cr.evaluation.score import render_metrics, score_file
    from mslora_cr.workers import cores

    print(render_metrics(score_file(args.answers, args.output, cores())))
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "report",
        "write report.html and report.md to a run's results folder",
        "mslora-cr report configs/demo.yaml",
        "mslora-cr report checkpoints/RUN",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration or run folder")
    _add_overrides(parser)
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from mslora_cr.evaluation.report import write_report

    config = _run_config(args.target, args.overrides)
    print(f"report: {write_report(config.run_dir, config.results_run_dir)}")
    return 0


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "compare",
        "compare runs on the same questions with paired significance tests, per task and overall",
        "mslora-cr compare checkpoints/mslora_cr checkpoints/sequential",
        "mslora-cr compare configs/a.yaml configs/b.yaml --at own --output comparison.json",
        "mslora-cr compare results/RUN results/RUN/routed     # what not being given the task ID costs",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="configuration, run folder or results folder of a run; the first of at least two is the baseline",
    )
    parser.add_argument(
        "--at",
        choices=("final", "own"),
        default="final",
        help="which scores to compare. final: every task after the last one (default; needs evaluate --stages final "
        "or seen); own: each task right after it was learned, as published",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the results as JSON")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from mslora_cr.evaluation.compare import compare, render_comparison
    from mslora_cr.files import write_json

    if len(args.runs) < 2:
        raise UserError("compare needs at least two runs, the baseline first")
    folders = [_results_folder(target) for target in args.runs]
    labels = _labels(folders)
    found = compare(dict(zip(labels, folders, strict=True)), args.at)
    print(render_comparison(found))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)
    return 0


def _add_analyze(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "analyze",
        "explain a run's results in its report: similarity and effective rank of the banks, leave-one-bank-out "
        "contributions, changed answers",
        "mslora-cr analyze configs/demo.yaml",
        "mslora-cr analyze checkpoints/with_beta --against checkpoints/without_beta",
        "mslora-cr analyze checkpoints/RUN --questions 0     # no leave-one-bank-out evaluation",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration or run folder")
    _add_overrides(parser)
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
        type=_count,
        metavar="N",
        help="questions per task for the leave-one-bank-out evaluation (default: 200; 0 skips it)",
    )
    parser.set_defaults(run=_analyze)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _analyze(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr.evaluation.analyze import QUESTIONS, analyze
    from mslora_cr.evaluation.report import write_report
    from mslora_cr.training.distributed import rank
    from mslora_cr.training.processes import stopping_together

    config = _run_config(args.target, args.overrides)
    others = [_run_config(target) for target in args.against]
    with stopping_together():
        path = analyze(config, others, QUESTIONS if args.questions is None else args.questions)
    if rank() == 0:
        print(f"analysis: {path}\nreport: {write_report(config.run_dir, config.results_run_dir)}")
    return 0


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "sweep",
        "run methods × task orders × seeds of one stream in parallel and summarize them in one table; an interrupted "
        "sweep resumes",
        "mslora-cr sweep configs/sweep.yaml --orders 2 --seeds 1 2 3",
        "mslora-cr sweep configs/sweep.yaml --methods mslora_cr incremental --seeds 1 2 3 4 5 --dry-run",
        "CUDA_VISIBLE_DEVICES=0,1 mslora-cr sweep configs/finetune_mslora_cr_ortho.yaml --orders 3",
    )
    _add_config(parser)
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="methods to run (default: all)")
    parser.add_argument(
        "--orders", type=int, default=1, metavar="N", help="number of task orders, the file's own first (default: 1)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="SEED", help="random seeds (default: the file's)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="parallel runs (default: one per GPU, or one per CPU core without GPUs)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, then exit")
    parser.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr import sweep

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    runs = sweep.plan_sweep(args.config, args.overrides, args.methods, args.orders, args.seeds)
    places = sweep.slots(runs[0].config.model.device, args.jobs)
    print(sweep.describe(runs, places), flush=True)
    if not args.dry_run:
        print(f"report: {sweep.run_sweep(runs, places)}")
    return 0


def _run_config(target: Path, overrides: Sequence[str] = ()) -> StreamConfig:
    """The configuration of a run, given directly or by its run folder.

    Raises:
        UserError: the folder is none, or its configuration belongs to another one, which would be read in its place.
    """
    from mslora_cr.config_file import load_config

    if not target.is_dir():
        return load_config(target, overrides)
    if not (target / "config.yaml").is_file():
        raise UserError(f"{target}: no config.yaml there; give a configuration or a run folder")
    config, folder = load_config(target / "config.yaml", overrides), target.resolve()
    if config.run_dir.resolve() != folder:
        raise UserError(
            f"{target}: its config.yaml is that of the run folder {config.run_dir.resolve()}. Move it back there, run "
            f"this where the run was trained, or give a configuration with run: {folder.name} and output_dir: "
            f"{folder.parent}"
        )
    return config


def _results_folder(target: Path) -> Path:
    """The results folder of a run, given by its configuration, its run folder or that folder itself."""
    return target if (target / "evaluation.json").is_file() else _run_config(target).results_run_dir


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or full paths where names repeat."""
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise UserError(f"the same run is given twice: {', '.join(labels)}")
    return labels


# --- data, model, bank ---------------------------------------------------------------------------------------------


def _add_data(commands: argparse._SubParsersAction) -> None:
    from mslora_cr.data import check, download, prepare

    parser = _command(
        commands,
        "data",
        "download, prepare and check data sets",
        "mslora-cr data download",
        "mslora-cr data prepare CXP --raw downloads/chest_xray.zip",
        "mslora-cr data check data/MSLoRA_CR --model pretrained_models/llava_med_v1.5",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = _command(
        actions, "download", "download the published annotations from the Hugging Face Hub", "mslora-cr data download"
    )
    download.add_data_arguments(action)
    action.set_defaults(run=download.run_data)
    action = _command(
        actions,
        "prepare",
        "convert a source's raw download into the folder layout that training reads",
        "mslora-cr data prepare CXP --raw downloads/chest_xray.zip",
        "mslora-cr data prepare PCAM --raw downloads/pcam/ --annotations",
    )
    prepare.add_arguments(action)
    action.set_defaults(run=prepare.run)
    action = _command(
        actions,
        "check",
        "validate a data root before training: annotations, images, train/test overlap, prompt lengths",
        "mslora-cr data check data/MSLoRA_CR --model pretrained_models/llava_med_v1.5",
        "mslora-cr data check --only derm HAM --no-images",
    )
    check.add_arguments(action)
    action.set_defaults(run=check.run)


def _add_model(commands: argparse._SubParsersAction) -> None:
    from mslora_cr.data import download

    parser = _command(
        commands,
        "model",
        "download and inspect base models",
        "mslora-cr model download",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = _command(
        actions,
        "download",
        "download the base model, CLIP and the published checkpoints from the Hugging Face Hub",
        "mslora-cr model download",
        "mslora-cr model download checkpoints",
    )
    download.add_model_arguments(action)
    action.set_defaults(run=download.run_model)
    action = _command(
        actions,
        "inspect",
        "show what a base model contains and compare its own vision tower with the one its configuration names",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5 --all",
    )
    action.add_argument("path", type=Path, metavar="MODEL", help="base model folder")
    action.add_argument("--all", action="store_true", help="list every tensor's difference, not only the largest eight")
    action.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr.inspection import inspect

    found = inspect(args.path)
    if not args.all:
        differences = found["towers"].pop("differences", {})
        worst = sorted(differences.items(), key=lambda item: -item[1] if isinstance(item[1], float) else float("-inf"))
        found["towers"]["largest_differences"] = dict(worst[:8])
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


def _add_bank(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "bank",
        "import, export and inspect banks",
        "mslora-cr bank import configs/finetune_mslora_cr_ortho.yaml --from checkpoints",
        "mslora-cr bank export configs/demo.yaml --output published/",
        "mslora-cr bank show checkpoints/RUN/banks/derm",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    export = _command(
        actions,
        "export",
        "export a run's banks in the published format, <a_b_c>/cl_lora.bin and config.json",
        "mslora-cr bank export configs/demo.yaml --output published/",
    )
    _add_config(export)
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="parent of the exported run's folder")
    export.set_defaults(run=_export)
    take = _command(
        actions,
        "import",
        "import published checkpoints or another run's banks as finished tasks of a run",
        "mslora-cr bank import configs/finetune_mslora_cr_ortho.yaml --from checkpoints",
        "mslora-cr bank import configs/finetune_mslora_cr_ortho.yaml run=longer --from checkpoints/RUN",
    )
    _add_config(take)
    take.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR",
        help="a published run, the folder of several, or a run folder",
    )
    take.set_defaults(run=_import)
    fit = _command(
        actions,
        "fit-router",
        "fit the router of `evaluate --banks-by routed` for banks that were trained elsewhere",
        "mslora-cr bank fit-router configs/finetune_mslora_cr_ortho.yaml",
    )
    _add_config(fit)
    fit.add_argument("--task", metavar="NAME", help="fit only this task")
    fit.set_defaults(run=_fit_router)
    show = _command(
        actions,
        "show",
        "show rank, layers and norms of a bank",
        "mslora-cr bank show checkpoints/RUN/banks/derm",
    )
    show.add_argument(
        "bank", type=Path, metavar="BANK", help="PEFT adapter folder, published checkpoint folder, or cl_lora.bin"
    )
    show.set_defaults(run=_show)


def _export(args: argparse.Namespace) -> int:
    config = _config(args)
    from mslora_cr.chains import export_chain
    from mslora_cr.evaluation.evaluate import finished_banks

    for folder in export_chain(finished_banks(config), config, args.output):
        print(folder)
    return 0


def _import(args: argparse.Namespace) -> int:
    config = _config(args)
    from mslora_cr.chains import import_chain

    imported = import_chain(args.source, config)
    done = f"imported {', '.join(imported)}" if imported else "nothing to import, every bank is already there"
    print(f"{config.run_dir}: {done}")
    return 0


def _fit_router(args: argparse.Namespace) -> int:
    config = _config(args)
    _quieten()
    from mslora_cr.evaluation.routed import fit_router
    from mslora_cr.training.processes import stopping_together

    with stopping_together():
        for path in fit_router(config, args.task):
            print(path)
    return 0


def _show(args: argparse.Namespace) -> int:
    from mslora_cr.banks import load_bank
    from mslora_cr.chains import describe

    print(json.dumps(describe(load_bank(args.bank)), indent=2))
    return 0


def _quieten() -> None:
    """Keep the console for this program's own progress: no loading bars, no advice for library authors."""
    import warnings

    import torch
    from transformers.utils.logging import disable_progress_bar

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would detect it by itself, with a warning
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


if __name__ == "__main__":
    sys.exit(main())
