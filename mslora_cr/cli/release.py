"""`mslora-cr release`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mslora_cr.cli.common import add_command, run_config
from mslora_cr.utils.errors import UserError

EXIT_CODES = {"release": 0, "hold": 3, "reject": 4}


def add_release(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "release",
        "decide by a registered plan whether an update of a run may ship, and keep the record",
        "mslora-cr release register plan.yaml RUN     # before the next task is trained",
        "mslora-cr release plan.yaml RUN              # exit code 0: release, 3: hold, 4: reject",
        "mslora-cr release list RUN",
        "mslora-cr release show RUN 2",
        "mslora-cr release verify RUN",
        "mslora-cr release rollback RUN 1",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="WORD",
        help="PLAN RUN to judge the newest task; or register PLAN RUN, list RUN, show RUN [N], verify RUN, "
        "rollback RUN N (write ./list for a plan of such a name)",
    )
    parser.set_defaults(run=_release)


def _release(args: argparse.Namespace) -> int:
    action, *rest = args.words
    if action not in ACTIONS:
        action, rest = "judge", args.words
    run, usage, counts = ACTIONS[action]
    if len(rest) not in counts:
        raise UserError(f"expected `mslora-cr release {usage}`")
    return run(rest)


def _register(words: Sequence[str]) -> int:
    from mslora_cr.release.plan import register
    from mslora_cr.runs.ledger import Ledger

    config = run_config(Path(words[1]))
    registration = register(Path(words[0]), Ledger.read(config), [task.name for task in config.stream])
    finished = ", ".join(registration.finished) or "no task"
    print(f"registered {registration.digest[:16]} at {registration.when}; tasks finished by then: {finished}")
    return 0


def _judge(words: Sequence[str]) -> int:
    from mslora_cr.release.records import decide
    from mslora_cr.reporting.release_page import release_table, write_release

    config = run_config(Path(words[1]))
    record = decide(Path(words[0]), config)
    print(release_table(record))
    print(f"record: {write_release(record, config)}")
    return EXIT_CODES[record.verdict]


def _list(words: Sequence[str]) -> int:
    from mslora_cr.release.records import records_of
    from mslora_cr.reporting.release_page import chain_table

    print(chain_table(records_of(run_config(Path(words[0])).run_dir)))
    return 0


def _show(words: Sequence[str]) -> int:
    from mslora_cr.release.records import ReleaseError, records_of
    from mslora_cr.reporting.release_page import release_table

    config = run_config(Path(words[0]))
    records = records_of(config.run_dir)
    if not records:
        raise ReleaseError(f"{config.run} has no record yet; `mslora-cr release PLAN RUN` makes the first")
    number = _number(words[1]) if len(words) > 1 else len(records)
    if not 0 < number <= len(records):
        raise ReleaseError(f"{config.run} has {len(records)} records, but none with number {number}")
    print(release_table(records[number - 1]))
    return 0


def _verify(words: Sequence[str]) -> int:
    from mslora_cr.release.records import records_of, released

    config = run_config(Path(words[0]))
    records = records_of(config.run_dir)
    for record in records:
        if record.kind == "gate" and record.verdict == "release":
            released(config, record.number)
    print(
        f"{config.run}: {len(records)} records; the chain is intact, and every released bank is the one that was judged"
    )
    return 0


def _rollback(words: Sequence[str]) -> int:
    from mslora_cr.release.records import rollback

    config = run_config(Path(words[0]))
    record = rollback(config, _number(words[1]))
    print(f"release {record.serves} of {config.run} is live again (record {record.number})")
    return 0


def _number(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{text!r} is not the number of a release; `mslora-cr release list RUN` shows them")
    return int(text)


ACTIONS: dict[str, tuple[Callable[[Sequence[str]], int], str, tuple[int, ...]]] = {
    "judge": (_judge, "PLAN RUN", (2,)),
    "register": (_register, "register PLAN RUN", (2,)),
    "list": (_list, "list RUN", (1,)),
    "show": (_show, "show RUN [N]", (1, 2)),
    "verify": (_verify, "verify RUN", (1,)),
    "rollback": (_rollback, "rollback RUN N", (2,)),
}
