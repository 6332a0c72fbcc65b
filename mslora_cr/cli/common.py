"""Code that the commands share: declaring them, loading the configuration they name, setting up the console."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.sources.download import Asset
from mslora_cr.data.sources.lock import LOCK
from mslora_cr.utils.errors import UserError, nearest, shorten
from mslora_cr.utils.logs import QUIET, VERBOSE

log = logging.getLogger(__name__)

EXTRAS = {"nltk": "eval", "tabulate": "eval", "matplotlib": "eval", "jinja2": "eval", "markupsafe": "eval"}
EXTRAS |= {"scipy": "eval", "deepspeed": "train", "h5py": "data", "bitsandbytes": "quantization"}
EXTRAS |= {"liger_kernel": "gpu", "optuna": "tune", "sklearn": "eval", "pycocoevalcap": "captions"}
EXTRAS |= {"pydicom": "data", "nibabel": "data", "pyarrow": "data"}
EXTRAS |= {"gguf": "gguf"}
EXTRAS |= {"starlette": "web", "uvicorn": "web", "multipart": "web", "python_multipart": "web"}
OVERRIDES = "override configuration values, e.g. lora.rank=32 tasks.pathvqa.epochs=1 'tasks.*.batch_size=8'"
CONFIG_HELP = "YAML file of the run, or the name of a shipped one (mslora-cr config list)"
OVERRIDE = re.compile(r"[A-Za-z_][\w.*+-]*=")


class Parser(argparse.ArgumentParser):
    """Names the nearest known word for an unknown one."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        choices = re.findall(r"[\w-]+", choice[2]) if choice else []
        super().error(message + (nearest(choice[1], choices) if choice else ""))


def typed(text: str) -> str:
    """Return a text of the command line: in UTF-8 where the console's encoding does not have its characters (`LANG=C`).

    Raises:
        UserError: Its bytes are no UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # Python keeps undecodable bytes as halves of surrogate pairs.
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError:
            raise UserError(f"{shorten(text)}: not a text in UTF-8") from None


def examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def add_command(
    commands: argparse._SubParsersAction, name: str, help: str, *example_lines: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=examples(*example_lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    speech = parser.add_mutually_exclusive_group()
    for flags, level, what in (
        (("-q", "--quiet"), QUIET, "show only warnings, errors and results"),
        (("-v", "--verbose"), VERBOSE, "show more messages"),
    ):
        speech.add_argument(
            *flags, dest="verbosity", action="store_const", const=level, default=argparse.SUPPRESS, help=what
        )
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help=CONFIG_HELP)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=OVERRIDES)
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-method",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="import this method although only a run folder names it, now and in later commands, until its module "
        "changes",
    )


def config_of(args: argparse.Namespace) -> StreamConfig:
    from mslora_cr.config.load import load_config

    return load_config(args.config, args.overrides)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def probability(text: str) -> float:
    """Return a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def share(text: str) -> float:
    """Return a number between 0 and 1, both excluded."""
    value = probability(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not strictly between 0 and 1")
    return value


def run_config(target: Path, overrides: Sequence[str] = ()) -> StreamConfig:
    """Return the configuration of a run, given by a configuration, its run folder or the run's name; as `find_run`."""
    from mslora_cr.config.find import find_run

    return find_run(target, overrides)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="RUN", help="configuration, run folder or name of a run")


def add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage",
        type=count,
        metavar="K",
        help="after the first K tasks (default: all that are trained); 0: base model",
    )


def add_release_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--release",
        type=positive,
        metavar="N",
        help="the banks of release N (`mslora-cr release list RUN`), checked against its record",
    )


def add_abstention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--abstain-below",
        type=probability,
        metavar="P",
        help="withhold answers whose tokens together are less probable than this, between 0 and 1",
    )
    parser.add_argument(
        "--risk",
        type=probability,
        metavar="R",
        help="abstain so that at most this share of all questions is answered wrongly, by the run's validation "
        "questions (`evaluate --calibrate`)",
    )


def abstains(args: argparse.Namespace) -> bool:
    """Return whether `--abstain-below` or `--risk` is given.

    Raises:
        UserError: Both are.
    """
    if args.abstain_below is not None and args.risk is not None:
        raise UserError("--abstain-below and --risk are two ways to set one threshold; give one of them")
    return args.abstain_below is not None or args.risk is not None


def stage_of(args: argparse.Namespace, config: StreamConfig) -> int | None:
    """Return the stage that `--stage` or `--release` names; None if neither is given."""
    stage: int | None = getattr(args, "stage", None)
    if args.release is None:
        return stage
    if stage is not None:
        raise UserError("--release already names a stage; leave --stage out")
    from mslora_cr.release.records import released

    record = released(config, args.release)
    if args.task is not None and args.task not in record.banks:
        raise UserError(f"--task {args.task}: not in release {record.number}, which has {', '.join(record.banks)}")
    return record.stage


def import_libraries(trains: bool = False) -> None:
    """Import the libraries that load a model, without the parts that the command does not use, and keep them quiet.

    The console then shows this program's own progress, without loading bars and advice for library authors.
    """
    import warnings

    import torch
    from transformers.utils.logging import disable_progress_bar

    from mslora_cr.utils.lean_imports import import_peft, import_transformers

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Otherwise DeepSpeed would detect it by itself, with a warning.
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if trains:
        import_peft()
    else:
        import_transformers()


def add_lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock",
        type=Path,
        default=LOCK,
        metavar="FILE",
        help="file of digests that downloads must match (%(default)s)",
    )
    parser.add_argument("--update", action="store_true", help="accept changes upstream, and lock the new digests")


def announce(asset: Asset, folder: Path) -> None:
    log.info("%s -> %s (licence: %s)", asset.repo, folder / asset.subfolder, asset.license)
