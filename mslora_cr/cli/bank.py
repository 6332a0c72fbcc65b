"""`mslora-cr bank`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mslora_cr.cli.common import CONFIG_HELP, add_command, add_config, config_of, import_libraries
from mslora_cr.utils.visible import print_json


def add_bank(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "bank",
        "import, export and inspect banks",
        "mslora-cr bank import finetune_mslora_cr_ortho --from checkpoints",
        "mslora-cr bank export demo --output published/",
        "mslora-cr bank show checkpoints/RUN/banks/derm",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    export = add_command(
        actions,
        "export",
        "export a run's banks in the published format, <a_b_c>/cl_lora.bin and config.json",
        "mslora-cr bank export demo --output published/",
    )
    add_config(export)
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="parent of the exported run's folder")
    export.set_defaults(run=_export)
    take = add_command(
        actions,
        "import",
        "import published checkpoints or another run's banks as finished tasks of a run",
        "mslora-cr bank import finetune_mslora_cr_ortho --from checkpoints",
        "mslora-cr bank import finetune_mslora_cr_ortho run=longer --from checkpoints/RUN",
    )
    add_config(take)
    take.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR",
        help="a published run, a folder of published runs, or a run folder",
    )
    take.set_defaults(run=_import)
    fit = add_command(
        actions,
        "fit-router",
        "fit the router of `evaluate --banks-by routed` for banks that were trained elsewhere",
        "mslora-cr bank fit-router finetune_mslora_cr_ortho",
    )
    add_config(fit)
    fit.add_argument("--task", metavar="NAME", help="fit only this task")
    fit.set_defaults(run=_fit_router, parallel=True)
    join = add_command(
        actions,
        "combine-router",
        "combine several sites' router statistics of one task; no record leaves its site",
        "mslora-cr bank combine-router RUN.yaml CXP --from site_a/banks/CXP site_b/banks/CXP",
    )
    join.add_argument("config", type=Path, metavar="CONFIG", help=CONFIG_HELP)
    join.add_argument("task", metavar="TASK", help="the task that all of these sites have")
    join.add_argument(
        "--from", dest="sources", type=Path, nargs="+", required=True, metavar="DIR", help="bank folder of each site"
    )
    join.set_defaults(run=_combine_router)
    show = add_command(
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
    config = config_of(args)
    from mslora_cr.runs.ledger import finished_banks
    from mslora_cr.stream.import_export import export_banks

    for folder in export_banks(finished_banks(config), config, args.output):
        print(folder)
    return 0


def _import(args: argparse.Namespace) -> int:
    config = config_of(args)
    from mslora_cr.stream.import_export import import_banks

    imported = import_banks(args.source, config)
    done = f"imported {', '.join(imported)}" if imported else "nothing to import: every bank is already there"
    print(f"{config.run_dir}: {done}")
    return 0


def _fit_router(args: argparse.Namespace) -> int:
    config = config_of(args)
    import_libraries()
    from mslora_cr.distributed.launch import abort_together
    from mslora_cr.stream.fit_router import fit_router

    with abort_together():
        for path in fit_router(config, args.task):
            print(path)
    return 0


def _combine_router(args: argparse.Namespace) -> int:
    from mslora_cr.config.load import load_config
    from mslora_cr.stream.fit_router import combine_router

    print(combine_router(load_config(args.config), args.task, args.sources))
    return 0


def _show(args: argparse.Namespace) -> int:
    from mslora_cr.banks.bank import describe
    from mslora_cr.banks.io import load_bank

    print_json(json.dumps(describe(load_bank(args.bank)), indent=2))
    return 0
