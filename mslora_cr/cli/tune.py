"""`mslora-cr tune`."""

from __future__ import annotations

import argparse

from mslora_cr.cli.common import add_command, add_config, config_of, import_libraries, positive, share
from mslora_cr.utils.errors import UserError


def add_tune(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "tune",
        "choose values of a configuration on validation questions; test questions are never read",
        "mslora-cr tune my_run.yaml --space mslora_cr --trials 30",
        "mslora-cr tune my_run.yaml --space space.yaml --trials 30 --jobs 4     # the same command resumes",
        "mslora-cr tune my_run.yaml --space ewc --seeds 101 102 --orders 2     # whole streams that are not reported",
    )
    add_config(parser)
    parser.add_argument(
        "--space", required=True, metavar="FILE", help="YAML file of keys and their values, or a method's name"
    )
    parser.add_argument(
        "--trials", type=positive, default=20, metavar="N", help="number of trials of each study (%(default)s)"
    )
    parser.add_argument(
        "--first",
        type=positive,
        default=2,
        metavar="K",
        help="values of the whole stream are chosen on its first K tasks (%(default)s); later tasks choose their own",
    )
    protocol = parser.add_mutually_exclusive_group()
    protocol.add_argument(
        "--causal",
        action="store_true",
        help="tune each task on its own validation questions when it is learned, never on later tasks; the default",
    )
    protocol.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="choose over whole streams of these seeds instead; report others",
    )
    parser.add_argument(
        "--orders",
        type=positive,
        default=1,
        metavar="N",
        help="with --seeds: number of task orders, none of them reported (%(default)s)",
    )
    parser.add_argument(
        "--reported-orders",
        type=positive,
        default=1,
        metavar="N",
        help="with --seeds: --orders of the sweep that is reported; its orders are left out (%(default)s)",
    )
    parser.add_argument("--metric", default="exact match score", metavar="NAME", help="score to maximize (%(default)s)")
    parser.add_argument(
        "--validation",
        type=share,
        default=0.1,
        metavar="X",
        help="share of the training records, where a data set has no val.jsonl (%(default)s)",
    )
    parser.add_argument("--jobs", type=positive, metavar="N", help="parallel trials (default: one per GPU or core)")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    config = config_of(args)
    if config.seed in args.seeds:
        raise UserError(f"--seeds {config.seed}: the seed of the run itself, which is to be reported; name others")
    import_libraries(trains=True)
    from mslora_cr.distributed import pool
    from mslora_cr.reporting.tuning_page import write_tuning_page
    from mslora_cr.tuning.space import read_space
    from mslora_cr.tuning.study import Plan, tune

    plan = Plan(
        args.config,
        tuple(args.overrides),
        read_space(args.space),
        args.trials,
        args.first,
        tuple(args.seeds),
        args.orders,
        args.metric,
        args.validation,
        args.reported_orders,
    )
    print(f"best configuration: {tune(plan, pool.devices(config.model.device, args.jobs))}")
    print(f"page: {write_tuning_page(plan.folder)}")
    return 0
