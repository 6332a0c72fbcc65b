"""`mslora-cr`, the only command. Libraries that are slow to import are imported by the command that needs them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from mslora_cr import __version__
from mslora_cr.cli.ask import add_ask
from mslora_cr.cli.bank import add_bank
from mslora_cr.cli.common import EXTRAS, OVERRIDE, Parser, examples
from mslora_cr.cli.completion import add_completion
from mslora_cr.cli.config import add_config_command
from mslora_cr.cli.data import add_data
from mslora_cr.cli.demo import add_demo
from mslora_cr.cli.evaluate import add_evaluate, add_score
from mslora_cr.cli.export import add_export, add_push
from mslora_cr.cli.model import add_model
from mslora_cr.cli.release import add_release
from mslora_cr.cli.report import add_analyze, add_compare, add_report, add_submit
from mslora_cr.cli.sweep import add_sweep
from mslora_cr.cli.train import add_train
from mslora_cr.cli.tune import add_tune
from mslora_cr.cli.web import add_web
from mslora_cr.config.trust import trust_method
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.inherited import LAUNCHED, ROUNDING, drop
from mslora_cr.utils.logs import NORMAL, set_up
from mslora_cr.utils.visible import NobodyReadsError, visible_results
from mslora_cr.utils.waiting import wait_passively

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success; 1 on an error that the user can fix, reported in a few lines; 130 on Ctrl-C; 141 if nobody reads
        the output any more, as in `… | head`.
    """
    wait_passively()
    rounding = drop(ROUNDING)  # before PyTorch is loaded
    try:
        with visible_results():
            return _run(argv, rounding)
    except NobodyReadsError:
        return 141


def _run(argv: Sequence[str] | None, rounding: str) -> int:
    args = _parse(argv)
    launched = "" if args.parallel or os.environ.get("WORLD_SIZE", "") in ("", "1") else drop(LAUNCHED)
    set_up(args.verbosity)
    if rounding:
        log.warning("the environment sets %s, which is ignored: it would change what is computed", rounding)
    if launched:
        log.warning("the environment sets %s, which is ignored: this command runs as one process", launched)
    try:
        for method in vars(args).get("trust_method", []):
            log.info("trusted in its current version: %s (%s)", trust_method(method), method)
        return int(args.run(args))
    except UserError as error:
        log.error("error: %s", error)
    except NobodyReadsError:
        raise
    except OSError as error:
        log.error("error: %s; finished work is kept", error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        missing = f"{error.name} is not installed; pip install 'mslora-cr[{extra}]' installs it"
        log.error("error: %s", missing)
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        log.error(
            "error: %r cannot be in the name of a file here, where names are in %s; set PYTHONUTF8=1 and run the "
            "same command again",
            error.object[error.start : error.end],
            sys.getfilesystemencoding(),
        )
    except KeyboardInterrupt:
        log.error("interrupted; run the same command again to resume")
        return 130
    return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Words of the form KEY=VALUE are overrides wherever they come after a command that takes them. argparse by itself
    would add them to an option's list, or refuse them after an option.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    if not _takes_overrides(parser, words):
        return parser.parse_args(words)
    overrides = [word for word in words if OVERRIDE.match(word)]
    args, rest = parser.parse_known_args([word for word in words if word not in overrides])
    args.overrides = overrides
    questions = vars(args).get("question")
    if questions is not None and not any(word.startswith("-") for word in rest):
        questions += rest  # argparse takes no more words for a list once an option follows it.
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _takes_overrides(parser: argparse.ArgumentParser, words: Sequence[str]) -> bool:
    """Return whether the command that these words name takes KEY=VALUE arguments."""
    for word in words:
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:
            break
        parser = nested[0].choices.get(word, parser)
    return any(action.dest == "overrides" for action in parser._actions)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; imports nothing heavy."""
    parser = Parser(
        allow_abbrev=False,
        prog="mslora-cr",
        description="Continual learning for biomedical vision-language models: one LoRA bank per imaging task.",
        epilog=examples(
            "mslora-cr demo",
            "mslora-cr train finetune_mslora_cr_ortho --dry-run",
            "mslora-cr evaluate finetune_mslora_cr_ortho --stages all",
            "mslora-cr report finetune_mslora_cr_ortho",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # The deepspeed launcher passes it.
    parser.set_defaults(verbosity=NORMAL, parallel=False)
    parser.add_argument("--version", action="version", version=f"mslora-cr {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_train(commands)
    add_evaluate(commands)
    add_score(commands)
    add_report(commands)
    add_compare(commands)
    add_submit(commands)
    add_analyze(commands)
    add_release(commands)
    add_sweep(commands)
    add_tune(commands)
    add_config_command(commands)
    add_ask(commands)
    add_web(commands)
    add_export(commands)
    add_push(commands)
    add_data(commands)
    add_model(commands)
    add_bank(commands)
    add_completion(commands, parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
