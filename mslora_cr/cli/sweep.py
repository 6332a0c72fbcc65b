"""`mslora-cr sweep`."""

from __future__ import annotations

import argparse

from mslora_cr.cli.common import add_command, add_config, import_libraries
from mslora_cr.utils.errors import UserError


def add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "sweep",
        "run methods × task orders × seeds of one stream in parallel and summarize them in one table; an interrupted "
        "sweep resumes",
        "mslora-cr sweep sweep --orders 2 --seeds 1 2 3",
        "mslora-cr sweep sweep --methods mslora_cr incremental --seeds 1 2 3 4 5 --dry-run",
        "mslora-cr sweep sweep --orders latin     # each task first, second, … equally often",
        "CUDA_VISIBLE_DEVICES=0,1 mslora-cr sweep finetune_mslora_cr_ortho --orders 3",
    )
    add_config(parser)
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="methods to run (default: all)")
    parser.add_argument(
        "--orders",
        type=_orders,
        default=1,
        metavar="N|latin",
        help="number of task orders, the file's own first (default: 1); latin: orders in which every task "
        "is equally often at every place, and right after every other task",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="SEED", help="random seeds (default: the file's)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="parallel runs (default: one per GPU, or one per CPU core without GPUs)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, then exit")
    parser.set_defaults(run=_sweep)


def _orders(text: str) -> int | str:
    if text == "latin":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor latin") from None


def _sweep(args: argparse.Namespace) -> int:
    import_libraries(trains=True)
    from mslora_cr import sweep
    from mslora_cr.distributed import pool

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    runs = sweep.plan_sweep(args.config, args.overrides, args.methods, args.orders, args.seeds)
    devices = pool.devices(runs[0].config.model.device, args.jobs)
    print(sweep.describe(runs, devices), flush=True)
    if not args.dry_run:
        print(f"report: {sweep.run_sweep(runs, devices)}")
    return 0
