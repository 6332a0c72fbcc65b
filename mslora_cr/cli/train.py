"""`mslora-cr train`."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mslora_cr.cli.common import add_command, add_config, config_of, import_libraries
from mslora_cr.config.schema import ConfigError, StreamConfig

log = logging.getLogger(__name__)


def add_train(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "train",
        "train one bank per task of the stream; finished tasks are skipped and an interrupted one resumes",
        "mslora-cr train demo --dry-run     # after `mslora-cr demo`",
        "mslora-cr train finetune_mslora_cr_ortho training.per_device_train_batch_size=4",
        "mslora-cr train finetune_mslora_cr_ortho --task derm",
        "mslora-cr train finetune_mslora_cr_ortho training.gradient_checkpointing=auto   # docs/how-to/distributed.md",
        "mslora-cr train demo run=ewc method=ewc ewc.strength=1e4    # methods: docs/reference/methods.md",
        "torchrun --nproc_per_node 4 -m mslora_cr train finetune_mslora_cr_ortho \\\n      training.deepspeed=zero2",
    )
    add_config(parser)
    parser.add_argument(
        "--task",
        metavar="NAME",
        action="append",
        default=[],
        help="train only this task; the banks that it builds on must exist; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, then exit"
    )
    parser.add_argument(
        "--force", action="store_true", help="resume in a run folder that was made with another configuration"
    )
    parser.set_defaults(run=_train, parallel=True)


def _train(args: argparse.Namespace) -> int:
    config = config_of(args)
    import_libraries(trains=True)
    from mslora_cr.distributed.comm import rank
    from mslora_cr.distributed.launch import abort_together
    from mslora_cr.stream import train as stream

    with abort_together():
        if not args.dry_run:
            stream.train(config, only=args.task, force=args.force)
            log.info("next: mslora-cr evaluate %s", shlex.join([str(args.config), *args.overrides]))
        elif rank() == 0:
            _print_plan(config, args.task, args.force)
    return 0


def _print_plan(config: StreamConfig, only: Sequence[str], force: bool) -> None:
    """Print what `train` would do with these arguments."""
    import yaml

    from mslora_cr.models.describe import summary
    from mslora_cr.runs.differences import with_former_defaults
    from mslora_cr.stream.plan import plan, tasks_to_train

    config = with_former_defaults(config)
    chosen = [task.name for task in tasks_to_train(config, only)]
    plans, trainable = plan(config)
    done = {item.task for item in plans if item.done}
    plans = [item for item in plans if item.task in chosen]
    named = {task.name for task in config.tasks}
    trimmed = config.model_copy(
        update={"datasets": {name: one for name, one in config.datasets.items() if name in named}}
    )
    print(yaml.safe_dump(trimmed.model_dump(mode="json"), sort_keys=False))
    print(f"run folder: {config.run_dir}\ntrainable parameters per bank: {trainable:,}")
    print("".join(f"{line}\n" for line in summary(Path(config.model.path))))
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
    for warning in _obstacles(config, chosen if only else (), force, done):
        log.warning("%s", warning)


def _obstacles(config: StreamConfig, only: Sequence[str], force: bool, done: Collection[str]) -> Iterator[str]:
    """Yield why training would refuse to start, as far as the plan shows it."""
    from mslora_cr.models.load import base_digest
    from mslora_cr.runs.ledger import Ledger
    from mslora_cr.stream.plan import banks_needed

    try:
        Ledger.read(config).check_same_configuration(config, base_digest(config), force)
    except ConfigError as error:
        yield str(error)
    for name in only:
        missing = [task.name for task in banks_needed(config, config.task(name)) if task.name not in {*done, *only}]
        if missing and name not in done:
            yield f"{name} builds on banks that are not trained yet: {', '.join(missing)}"
