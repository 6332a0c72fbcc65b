"""`mslora-cr`: the one command. Libraries that take seconds to import are imported by the command that needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mslora_cr import __version__
from mslora_cr.errors import UserError

if TYPE_CHECKING:
    from mslora_cr.config import StreamConfig

EXTRAS = {"nltk": "eval", "tabulate": "eval", "matplotlib": "eval", "jinja2": "eval", "markupsafe": "eval"}
EXTRAS |= {"rouge_score": "eval", "deepspeed": "train", "wandb": "train", "tensorboard": "train", "h5py": "data"}
EXTRAS |= {"bitsandbytes": "quantization"}
OVERRIDES = "any value of the configuration, e.g. lora.rank=32 tasks.pathvqa.epochs=1 'tasks.*.batch_size=8'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 on an error that the user can mend, told in a few lines, 130 on Ctrl-C."""
    args = _parse(argv)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"mslora-cr: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"mslora-cr: error: {error}; nothing that was finished before is lost", file=sys.stderr)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        missing = f"{error.name} is not installed; pip install -e '.[{extra}]' brings it"
        print(f"mslora-cr: error: {missing}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nmslora-cr: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with KEY=VALUE overrides anywhere behind the configuration: argparse by itself takes
    a list of positional arguments only in one piece."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += overrides
    return args


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="mslora-cr",
        description="Teach a biomedical vision-language model one imaging task after another, a LoRA bank per task.",
        epilog=_examples(
            "mslora-cr demo",
            "mslora-cr train configs/finetune_mslora_cr_ortho.yaml --dry-run",
            "mslora-cr evaluate configs/finetune_mslora_cr_ortho.yaml --stages all",
            "mslora-cr report configs/finetune_mslora_cr_ortho.yaml",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
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
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=_examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _config(args: argparse.Namespace) -> StreamConfig:
    from mslora_cr.config_file import load_config

    return load_config(args.config, args.overrides)


# --- demo ----------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "demo",
        "make a tiny model and a synthetic stream, train and compare two methods on it, and write a report",
        "mslora-cr demo",
        "mslora-cr demo evaluation.batch_size=32",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
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
        "train the banks of a stream, one task after another; finished tasks are skipped, a killed one goes on",
        "mslora-cr train configs/demo.yaml --dry-run",
        "mslora-cr train configs/finetune_mslora_cr_ortho.yaml training.per_device_train_batch_size=4",
        "mslora-cr train configs/finetune_mslora_cr_ortho.yaml --task derm",
        "mslora-cr train configs/demo.yaml run=ewc method=ewc ewc.strength=1e4    # methods: docs/methods.md",
        "torchrun --nproc_per_node 4 -m mslora_cr train configs/finetune_mslora_cr_ortho.yaml \\\n"
        "      training.deepspeed=configs/deepspeed/zero2.json",
    )
    _add_config(parser)
    parser.add_argument("--task", metavar="NAME", help="train this task only; the banks it builds on must be there")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and plan, train nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="go on in a run folder that another configuration has made"
    )
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    _quieten()
    from mslora_cr.training import stream
    from mslora_cr.training.processes import stopping_together

    if args.dry_run:
        _print_plan(config)
        return 0
    with stopping_together():
        stream.train(config, only=args.task, force=args.force)
    return 0


def _print_plan(config: StreamConfig) -> None:
    import yaml

    from mslora_cr.training.stream import plan

    plans, trainable = plan(config)
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


# --- evaluate, score, report ---------------------------------------------------------------------------------------


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "evaluate",
        "answer and score the test questions of every learned task; a killed evaluation goes on",
        "mslora-cr evaluate configs/demo.yaml",
        "mslora-cr evaluate configs/demo.yaml --stages all",
        "mslora-cr evaluate configs/demo.yaml --banks-by routed     # without telling the task",
        "mslora-cr evaluate configs/finetune_mslora_cr_ortho.yaml --banks checkpoints/published",
    )
    _add_config(parser)
    parser.add_argument("--task", metavar="NAME", help="answer this task only")
    parser.add_argument(
        "--stages",
        choices=("own", "final", "seen", "all"),
        help="own: task t after task t, as published (default); final: all after the last task (default if routed); "
        "seen: at every stage from its own on; "
        "all: the whole task × stage matrix, and the base model without a bank (forward transfer needs both)",
    )
    parser.add_argument(
        "--banks",
        type=Path,
        metavar="DIR",
        help="take the banks from published checkpoint folders or another run folder",
    )
    parser.add_argument(
        "--banks-by",
        choices=("prefix", "all", "routed"),
        help="which banks answer task t: prefix: 1..t, as published (default); all: every bank there is; routed: the "
        "prefix of the task that the router takes each question for, with results in routed/",
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    if args.banks_by:
        args.overrides.append(f"evaluation.banks_by={args.banks_by}")
    config = _config(args)
    if args.task and config.evaluation.banks_by == "routed":
        raise UserError("--task tells the task; routed questions of all tasks are answered together, so leave it out")
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
        print(f"answers and scores: {path.parent}")
    return 0


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "score",
        "score a file of answers as the published evaluation does",
        "mslora-cr score results/RUN/pathvqa/answer-file.jsonl --output scores/",
    )
    parser.add_argument(
        "answers",
        type=Path,
        metavar="ANSWERS.jsonl",
        help="answers with question_id, prompt, text, gt, answer_type",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where metrics and hit lists go")
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    from mslora_cr.evaluation.score import render_metrics, score_file

    print(render_metrics(score_file(args.answers, args.output)))
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "report",
        "write report.html and report.md of a run beside its scores",
        "mslora-cr report configs/demo.yaml",
        "mslora-cr report checkpoints/RUN",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="the run's configuration, or its run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from mslora_cr.config_file import load_config
    from mslora_cr.evaluation.report import write_report

    config = load_config(_config_file(args.target), args.overrides)
    print(f"report: {write_report(config.run_dir, config.results_run_dir)}")
    return 0


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "compare",
        "test runs of the same questions against the first one, per task and overall",
        "mslora-cr compare checkpoints/mslora_cr checkpoints/sequential",
        "mslora-cr compare configs/a.yaml configs/b.yaml --at own --output comparison.json",
        "mslora-cr compare results/RUN results/RUN/routed     # what routing costs against being told the task",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's configuration, its run folder or its results folder; at least two, the first is the baseline",
    )
    parser.add_argument(
        "--at",
        choices=("final", "own"),
        default="final",
        help="final: score each task after the last stage (default; needs evaluate --stages seen, where they are "
        "several); own: each at its own stage, as published",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the tests there too")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from mslora_cr.evaluation.compare import compare, render_comparison
    from mslora_cr.training.ledger import write_json

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
        "look for what explains a run's result, and put it into the report: how banks lie to each other, their "
        "effective ranks, what each adds to the answers, which answers changed",
        "mslora-cr analyze configs/demo.yaml",
        "mslora-cr analyze checkpoints/with_beta --against checkpoints/without_beta",
        "mslora-cr analyze checkpoints/RUN --questions 0     # without asking the model",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="the run's configuration, or its run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument(
        "--against", nargs="+", type=Path, default=[], metavar="RUN", help="put these runs' effective ranks beside"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=200,
        metavar="N",
        help="ask at most so many questions of a task, with every bank left out once (default 200; 0: none)",
    )
    parser.set_defaults(run=_analyze)


def _analyze(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr.config_file import load_config
    from mslora_cr.evaluation.analyze import analyze
    from mslora_cr.evaluation.report import write_report
    from mslora_cr.training.distributed import rank
    from mslora_cr.training.processes import stopping_together

    config = load_config(_config_file(args.target), args.overrides)
    others = [load_config(_config_file(target)) for target in args.against]
    with stopping_together():
        path = analyze(config, others, args.questions)
    if rank() == 0:
        print(f"analysis: {path}\nreport: {write_report(config.run_dir, config.results_run_dir)}")
    return 0


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "sweep",
        "run methods × orders of the tasks × seeds of one stream, side by side, and gather them into one table; what "
        "is finished is kept, a killed sweep goes on",
        "mslora-cr sweep configs/sweep.yaml --orders 2 --seeds 1 2 3",
        "mslora-cr sweep configs/sweep.yaml --methods mslora_cr incremental --seeds 1 2 3 4 5 --dry-run",
        "CUDA_VISIBLE_DEVICES=0,1 mslora-cr sweep configs/finetune_mslora_cr_ortho.yaml --orders 3",
    )
    _add_config(parser)
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="which methods (default: all)")
    parser.add_argument(
        "--orders", type=int, default=1, metavar="N", help="how many orders of the tasks, the file's first (default 1)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="default: the file's")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once (default: one for each GPU, or for each core without any)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr import sweep

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; give at least 1")
    runs = sweep.plan_sweep(args.config, args.overrides, args.methods, args.orders, args.seeds)
    places = sweep.slots(runs[0].config.model.device, args.jobs)
    print(sweep.describe(runs, places), flush=True)
    if not args.dry_run:
        print(f"report: {sweep.run_sweep(runs, places)}")
    return 0


def _config_file(target: Path) -> Path:
    """A run's configuration, given as such or by its run folder."""
    return target / "config.yaml" if target.is_dir() else target


def _results_folder(target: Path) -> Path:
    """The results folder of a run that is named by its configuration, its run folder or that folder itself."""
    from mslora_cr.config_file import load_config

    if (target / "evaluation.json").is_file():
        return target
    return load_config(_config_file(target)).results_run_dir


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or whole paths where names repeat."""
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise UserError(f"a run stands twice among {', '.join(labels)}")
    return labels


# --- data, model, bank ---------------------------------------------------------------------------------------------


def _add_data(commands: argparse._SubParsersAction) -> None:
    from mslora_cr.data import check, download, prepare

    parser = commands.add_parser("data", help="download, prepare and check data sets")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = _command(actions, "download", "fetch the published annotations from the hub", "mslora-cr data download")
    download.add_data_arguments(action)
    action.set_defaults(run=download.run_data)
    action = _command(
        actions,
        "prepare",
        "turn a source's raw download into the tree that training reads",
        "mslora-cr data prepare CXP --raw downloads/chest_xray.zip",
        "mslora-cr data prepare PCAM --raw downloads/pcam/ --annotations",
    )
    prepare.add_arguments(action)
    action.set_defaults(run=prepare.run)
    action = _command(
        actions,
        "check",
        "look at a whole data root before an hour is spent",
        "mslora-cr data check data/MSLoRA_CR --model pretrained_models/llava_med_v1.5",
        "mslora-cr data check --only derm HAM --no-images",
    )
    check.add_arguments(action)
    action.set_defaults(run=check.run)


def _add_model(commands: argparse._SubParsersAction) -> None:
    from mslora_cr.data import download

    parser = commands.add_parser("model", help="download base models and look into them")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = _command(
        actions,
        "download",
        "fetch the base model, CLIP and the published checkpoints from the hub",
        "mslora-cr model download",
        "mslora-cr model download checkpoints",
    )
    download.add_model_arguments(action)
    action.set_defaults(run=download.run_model)
    action = _command(
        actions,
        "inspect",
        "print what a base model holds, and compare its own vision tower with the one its configuration names",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5 --json",
    )
    action.add_argument("path", type=Path, metavar="MODEL", help="the base model's folder")
    action.add_argument("--json", action="store_true", help="print everything as JSON, with every tensor's difference")
    action.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    _quieten()
    from mslora_cr.inspection import inspect

    found = inspect(args.path)
    if not args.json:
        differences = found["towers"].pop("differences", {})
        worst = sorted(differences.items(), key=lambda item: -item[1] if isinstance(item[1], float) else float("-inf"))
        found["towers"]["largest_differences"] = dict(worst[:8])
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


def _add_bank(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bank", help="export and show banks")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    export = _command(
        actions,
        "export",
        "write a run's banks as published checkpoints, <a_b_c>/cl_lora.bin and config.json",
        "mslora-cr bank export configs/demo.yaml --output published/",
    )
    _add_config(export)
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the run's folder goes")
    export.set_defaults(run=_export)
    fit = _command(
        actions,
        "fit-router",
        "put with the banks what `evaluate --banks-by routed` needs, for banks that were trained elsewhere",
        "mslora-cr bank fit-router configs/finetune_mslora_cr_ortho.yaml",
    )
    _add_config(fit)
    fit.add_argument("--task", metavar="NAME", help="for this task only")
    fit.set_defaults(run=_fit_router)
    show = _command(
        actions,
        "show",
        "print what a bank is: rank, layers, norms",
        "mslora-cr bank show checkpoints/RUN/banks/derm",
    )
    show.add_argument(
        "bank", type=Path, metavar="BANK", help="a PEFT adapter folder, a published folder, or cl_lora.bin"
    )
    show.set_defaults(run=_show)


def _export(args: argparse.Namespace) -> int:
    config = _config(args)
    from mslora_cr.chains import export_chain
    from mslora_cr.evaluation.evaluate import finished_banks

    for folder in export_chain(finished_banks(config), config, args.output):
        print(folder)
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
    """Leave the console to this program's own progress: no bars for loading, no advice for library authors."""
    import logging
    import os
    import warnings

    import torch
    from transformers.utils.logging import disable_progress_bar

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, and warn of it
    # It advises further packages when PEFT looks for it, and float16 at every 8-bit layer of every forward pass.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


if __name__ == "__main__":
    sys.exit(main())
