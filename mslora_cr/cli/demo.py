"""`mslora-cr demo`."""

from __future__ import annotations

import argparse

from mslora_cr.cli.common import add_command, add_overrides, import_libraries


def add_demo(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "demo",
        "build a tiny model and a synthetic task stream, train and compare two methods on it, and write a report",
        "mslora-cr demo",
        "mslora-cr demo evaluation.batch_size=32",
    )
    add_overrides(parser)
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    import_libraries(trains=True)
    from mslora_cr.demo import run_demo

    run_demo(args.overrides)
    return 0
