"""`mslora-cr data download open` and `mslora-cr data prepare open`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mslora_cr.cli.common import positive

OPEN_ARCHIVES = Path("downloads/open")
OPEN_ROOT = Path("data/open")


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="NAME", nargs="+", help="of the open stream: only these data sets")


def add_most(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--most",
        metavar=("TRAIN", "TEST"),
        nargs=2,
        type=positive,
        help="of the open stream: at most so many training and test rows of each data set, drawn at random, the same "
        "every time",
    )


def add_open_download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=("published", "open"), default="published", help="which stream (%(default)s)"
    )
    add_only(parser)
    parser.add_argument(
        "--accept",
        metavar="LICENCE",
        nargs="+",
        default=[],
        help="of the open stream: names of the licences that you accept",
    )
    parser.add_argument(
        "--accept-non-commercial",
        metavar="LICENCE",
        nargs="+",
        default=[],
        help="of the open stream: names of the licences without commercial use that you accept",
    )
    parser.add_argument("--endpoint", metavar="URL", help="a mirror of github.com")


def run_download_open(args: argparse.Namespace) -> int:
    """Return 0 if every archive is there. It is an error if a licence was not accepted, or an archive does not match
    its digest."""
    from mslora_cr.data.open.catalog import chosen_sources
    from mslora_cr.data.open.download import ENDPOINT, check_accepted, download_open

    sources, folder = chosen_sources(args.only), args.root or OPEN_ARCHIVES
    for source in sources:
        use = "" if source.commercial else ", no commercial use"
        print(f"{source.name}: {source.title}\n    licence: {source.license}{use}\n    {source.source}")
    check_accepted(sources, args.accept, args.accept_non_commercial)
    for source in sources:
        archive = download_open(
            source, folder, args.endpoint or ENDPOINT, args.lock, args.update, progress=sys.stderr.isatty()
        )
        print(f"{source.name}: {archive}, {archive.stat().st_size:,} bytes")
    print(f"Next: mslora-cr data prepare open --raw {folder}")
    return 0


def run_prepare_open(args: argparse.Namespace) -> int:
    """Return 0 if every requested data set is written; 1 if the raw download lacks some."""
    from mslora_cr.data.open.catalog import chosen_sources
    from mslora_cr.data.open.prepare import prepare_open
    from mslora_cr.data.records import DataError

    if args.annotations or args.skip_missing or args.question:
        raise DataError("--annotations, --skip-missing and --question are for the published data sets, not for `open`")
    root = args.root or OPEN_ROOT
    written, missing = prepare_open(
        chosen_sources(args.only),
        args.raw,
        root,
        args.copy,
        sys.stderr.isatty(),
        dict(zip(("train", "test"), args.most, strict=True)) if args.most else {},
    )
    for prepared in written:
        sides = ", ".join(
            f"{prepared.rows[side]:,} rows of {prepared.images[side]:,} images for {use}"
            for side, use in (("train", "training"), ("test", "testing"))
        )
        print(f"{prepared.name}: {sides}")
        if prepared.test_rows_of_shared:
            print(
                f"  the source's own split: {prepared.test_rows_of_shared:,} test rows are about patients or images of "
                "the training side"
            )
    for source in missing:
        print(f"not in the raw download: {source.name} (github.com/{source.repository})")
    print(
        f"Data root: {root}. Next: mslora-cr data check open data.root={root}" if not missing else f"Data root: {root}"
    )
    return 1 if missing else 0
