"""`mslora-cr export` and `mslora-cr push`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from mslora_cr.cli.common import (
    add_command,
    add_overrides,
    add_release_option,
    add_run,
    add_stage,
    import_libraries,
    run_config,
    stage_of,
)
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)


def add_export(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "export",
        "write a run for other programs: PEFT adapters, merged models, GGUF files, or published checkpoints",
        "mslora-cr export RUN --output exported --format peft",
        "mslora-cr export RUN --output exported --format merged --task derm",
        "mslora-cr export RUN --output exported --format gguf",
        "mslora-cr export RUN --output published --format published",
    )
    add_run(parser)
    add_overrides(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="parent of the exported folders")
    parser.add_argument(
        "--format",
        choices=("peft", "merged", "gguf", "published"),
        required=True,
        help="peft: one adapter per task, the sum of its banks, and the base model in transformers' layout; "
        "merged: one model per task, with tokenizer and processor; gguf: for llama.cpp, the base model, its projector "
        "and one adapter per task; published: cl_lora.bin of every bank, "
        "which `bank import --from` reads",
    )
    parser.add_argument("--task", metavar="NAME", help="export only this task")
    add_stage(parser)
    add_release_option(parser)
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="with peft: a folder or hub name that already holds the base model in transformers' layout, for the "
        "adapters to name; nothing is written to DIR/base then",
    )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    config = run_config(args.target, args.overrides)
    if args.base and args.format != "peft":
        raise UserError("--base belongs to --format peft: the other formats do not name a base model")
    stage = stage_of(args, config)
    import_libraries()
    from mslora_cr.serving.export import export, max_lora_rank, read_record

    ranks = [0]
    for folder in export(config, args.output, args.format, args.task, stage, args.base):
        print(folder, flush=True)
        ranks.append(read_record(folder).get("rank", 0))
    if args.format == "peft":
        most = max_lora_rank(max(ranks))
        advice = f"--max-lora-rank {most}" if most else f"none of its ranks holds {max(ranks)}; use --format merged"
        log.info("vLLM: %s", advice)
    return 0


def add_push(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "push",
        "upload a run's adapters or merged models to the Hugging Face hub, with a model card",
        "mslora-cr push RUN owner/name --dry-run     # the card alone",
        "mslora-cr push RUN owner/name --task derm",
        "mslora-cr push RUN owner/base --format merged --stage 0     # the base model in transformers' layout",
    )
    add_run(parser)
    parser.add_argument("repo", metavar="REPO", help="repository, owner/name; created if it does not exist")
    add_overrides(parser)
    parser.add_argument("--format", choices=("peft", "merged"), default="peft", help="as `export` (default: peft)")
    parser.add_argument("--task", metavar="NAME", help="upload only this task, at the top of the repository")
    add_stage(parser)
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
    import_libraries()
    from mslora_cr.serving.push import push, write_card

    if args.dry_run:
        print(write_card(config, args.repo, args.format, args.task, args.stage, args.base))
    else:
        print(push(config, args.repo, args.format, args.task, args.stage, args.base, args.public))
    return 0
