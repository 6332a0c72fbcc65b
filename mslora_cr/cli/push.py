"""`mslora-cr push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mslora_cr.cli.common import add_command, add_overrides, count, quieten, run_config


def add_push(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "push",
        "upload a run's adapters or merged models to the Hugging Face hub, with a model card",
        "mslora-cr push RUN owner/name --dry-run     # the card alone",
        "mslora-cr push RUN owner/name --task derm",
        "mslora-cr push RUN owner/base --format merged --stage 0     # the base model in transformers' layout",
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration, run folder or name of a run")
    parser.add_argument("repo", metavar="REPO", help="repository, owner/name; made if it is not there")
    add_overrides(parser)
    parser.add_argument("--format", choices=("peft", "merged"), default="peft", help="as `export` (default: peft)")
    parser.add_argument("--task", metavar="NAME", help="only this task's, at the top of the repository")
    parser.add_argument(
        "--stage", type=count, metavar="K", help="after the first K tasks (default: all that are trained)"
    )
    parser.add_argument(
        "--base",
        metavar="OWNER/NAME",
        help="the base model on the hub, which card and adapters name (default: where `model download` fetched it)",
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    parser.add_argument("--dry-run", action="store_true", help="write the card to the run folder; upload nothing")
    parser.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> int:
    config = run_config(args.target, args.overrides)
    quieten()
    from mslora_cr.serving.push import push, write_card

    if args.dry_run:
        print(write_card(config, args.repo, args.format, args.task, args.stage, args.base))
    else:
        print(push(config, args.repo, args.format, args.task, args.stage, args.base, args.public))
    return 0
