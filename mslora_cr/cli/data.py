"""`mslora-cr data`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from mslora_cr.cli.common import add_command, add_lock, announce, positive
from mslora_cr.cli.convert import add_convert
from mslora_cr.cli.open_stream import (
    OPEN_ARCHIVES,
    OPEN_ROOT,
    add_most,
    add_only,
    add_open_download_arguments,
    run_download_open,
    run_prepare_open,
)
from mslora_cr.data.advice import missing_annotations
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.catalog import DataSet, catalog, data_set, unusual_modality
from mslora_cr.data.sources.check import OwnDataSet, Scan, check
from mslora_cr.data.sources.check_report import table
from mslora_cr.data.sources.download import ANNOTATIONS, download
from mslora_cr.data.sources.prepare import prepare
from mslora_cr.utils.errors import nearest
from mslora_cr.utils.files import write_json
from mslora_cr.utils.workers import cores

log = logging.getLogger(__name__)
PUBLISHED_ROOT = Path("data/MSLoRA_CR")
MAX_LENGTH = 2048
"""Positions of a sample where no configuration says otherwise."""


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(catalog())}, or open (the open stream)")
    parser.add_argument("--raw", type=Path, nargs="+", required=True, help="raw download: folders and archives")
    parser.add_argument("--root", type=Path, help=f"data root ({PUBLISHED_ROOT}; of the open stream {OPEN_ROOT})")
    add_only(parser)
    add_most(parser)
    parser.add_argument(
        "--annotations", action="store_true", help="build train.json, test.jsonl and val.jsonl from the raw download"
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="with --annotations: leave out rows whose images are missing or unreadable, and count them; "
        "scores on the smaller test set cannot be compared with published ones",
    )
    parser.add_argument("--copy", action="store_true", help="copy images instead of linking them")
    parser.add_argument(
        "--question",
        metavar="KEY=TEXT",
        action="append",
        default=[],
        help="with --annotations: replaces the catalogue's question KEY; may be repeated",
    )


def run_prepare(args: argparse.Namespace) -> int:
    """Return 0 if every image that the annotations name is in place; 1 if some are missing or ambiguous."""
    if args.name == "open":
        return run_prepare_open(args)
    if args.most:
        raise DataError("--most is for the open stream")
    dataset = data_set(args.name)
    if args.skip_missing and not args.annotations:
        raise DataError("--skip-missing needs --annotations, which builds the annotations; give both")
    result = prepare(
        dataset,
        args.raw,
        args.root or PUBLISHED_ROOT,
        args.annotations,
        args.copy,
        _questions(args.question),
        sys.stderr.isatty(),
        args.skip_missing,
    )
    if result.rows is not None:
        left_out = f"; {result.rows['empty']} rows without question or answer left out" if result.rows["empty"] else ""
        validation = f", {rows} validation rows" if (rows := result.rows.get("validation")) else ""
        print(
            f"annotations: {result.rows['train']} training rows, {result.rows['test']} test rows{validation}{left_out}"
        )
    print(f"{dataset.name}: {result.placed} images placed, {result.present} already present")
    for name in result.missing[:20]:
        print(f"  missing: {name}")
    for name, candidates in list(result.ambiguous.items())[:20]:
        print(f"  ambiguous: {name} could be {' or '.join(candidates)}")
    if args.skip_missing and result.rows is not None:
        gone = len(result.missing) + len(result.ambiguous) + len(result.unreadable)
        print(f"left out: {gone} images that are missing, ambiguous or unreadable, {result.rows['unavailable']} rows")
        if gone:
            print("Scores on the remaining rows cannot be compared with those of the whole data set.")
        for name in result.unreadable[:20]:
            print(f"  unreadable: {name}")
        return 0
    if result.missing or result.ambiguous:
        print(f"{len(result.missing)} missing, {len(result.ambiguous)} ambiguous. Licence: {dataset.license}.")
        print(f"Source: {dataset.source}. {dataset.access}")
        return 1
    return 0


def _questions(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise DataError(f"--question {pair!r}: expected KEY=TEXT")
    return dict(pair.split("=", 1) for pair in pairs)


def add_data(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "data",
        "download, prepare, convert and check data sets",
        "mslora-cr data download",
        "mslora-cr data prepare CXP --raw downloads/chest_xray.zip",
        "mslora-cr data check data/MSLoRA_CR --model pretrained_models/llava_med_v1.5",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = add_command(
        actions,
        "download",
        "download the published annotations from the Hugging Face Hub, or the open stream from public git repositories",
        "mslora-cr data download",
        "mslora-cr data download open                   # shows the licences",
        "mslora-cr data download open --only VQA-RAD BCCD --accept CC0-1.0 MIT",
    )
    add_data_download_arguments(action)
    action.set_defaults(run=run_data_download)
    action = add_command(
        actions,
        "prepare",
        "convert a source's raw download into the folder layout that training reads",
        "mslora-cr data prepare CXP --raw downloads/chest_xray.zip",
        "mslora-cr data prepare PCAM --raw downloads/pcam/ --annotations",
        "mslora-cr data prepare open --raw downloads/open/",
    )
    add_prepare_arguments(action)
    action.set_defaults(run=run_prepare)
    add_convert(actions)
    action = add_command(
        actions,
        "check",
        "validate the data of a configuration's tasks, or of a published data root, before training: annotations, "
        "images, "
        "train/test overlap, prompt lengths",
        "mslora-cr data check demo",
        "mslora-cr data check data/MSLoRA_CR --model pretrained_models/llava_med_v1.5",
        "mslora-cr data check --only derm HAM --no-images",
    )
    add_check_arguments(action)
    action.set_defaults(run=run_check)


def add_data_download_arguments(parser: argparse.ArgumentParser) -> None:
    add_open_download_arguments(parser)
    parser.add_argument(
        "--root", type=Path, help=f"target folder ({PUBLISHED_ROOT}; {OPEN_ARCHIVES} for archives of the open stream)"
    )
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    add_lock(parser)


def run_data_download(args: argparse.Namespace) -> int:
    """Return 0 if every data set has its annotations; 1 if some are not on the hub."""
    if args.what == "open":
        return run_download_open(args)
    root = args.root or PUBLISHED_ROOT
    announce(ANNOTATIONS, root)
    download(ANNOTATIONS, root, args.revision, lock=args.lock, update=args.update)
    lacking = []
    print("Images come from their own sources; `mslora-cr data prepare NAME --raw PATH` puts them in place:")
    for entry in catalog().values():
        here = [name for name in ("train.json", "test.jsonl") if (root / entry.folder / name).is_file()]
        lacking += [entry.name] if len(here) < 2 else []
        print(f"  {entry.name}: {entry.title}, {entry.license}\n    {entry.source}\n    {entry.access}")
    if lacking:
        print(f"without annotations after the download: {', '.join(lacking)}")
    return 1 if lacking else 0


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root",
        metavar="CONFIG|ROOT",
        type=Path,
        nargs="?",
        default=Path("data/MSLoRA_CR"),
        help="a configuration, whose tasks are checked, including your own data sets, or a data root with the "
        "published data "
        "sets (%(default)s)",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="check only these data sets")
    parser.add_argument("--model", type=Path, help="model folder; also reports samples that would be truncated")
    parser.add_argument(
        "--max-length",
        type=positive,
        help=f"with --model: positions per sample (a configuration's data.max_length, else {MAX_LENGTH})",
    )
    parser.add_argument("--no-images", action="store_true", help="check only the annotations")
    parser.add_argument("--workers", type=positive, default=cores(), help="processes that decode images (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/data-check.json"), help="report (%(default)s)")


class _ToCheck(NamedTuple):
    """The data sets to check below a data root, and what their samples are measured by."""

    root: Path
    datasets: Sequence[DataSet] | Sequence[OwnDataSet]
    max_length: int = MAX_LENGTH
    all_images: bool = False


def _to_check(target: Path, overrides: Sequence[str], only: Sequence[str]) -> _ToCheck:
    """Return the data sets of a configuration's tasks, or the published ones below a data root."""
    if target.is_dir():
        if overrides:
            raise DataError(f"{target} is a folder, and {overrides[0]} would override a configuration; name one")
        return _ToCheck(target, [data_set(name) for name in only] or list(catalog().values()))
    from mslora_cr.config.load import load_config
    from mslora_cr.config.shipped import configurations

    if target.suffix not in (".yaml", ".yml") and str(target) not in configurations():
        raise DataError(
            f"{target}: no such folder, and no configuration (.yaml){missing_annotations(target / 'train.json')}"
        )

    config = load_config(target, overrides)
    names = [task.name for task in config.tasks]
    for name in only:
        if name not in names:
            raise DataError(f"--only {name}: no task of {target}{nearest(name, names)}; it has {', '.join(names)}")
    configured = []
    for task in config.stream:
        if close := unusual_modality(task.modality):
            log.warning("%s: modality %r is not in the catalogue; did you mean %r?", task.name, task.modality, close)
        published = config.datasets[task.name].published
        rows = catalog()[published].test_rows if published in catalog() else None
        folders = (task.name, task.folder, tuple(task.image_folders))
        configured.append(OwnDataSet(*folders, rows, task.train, task.test, task.benchmark, task.references))
    datasets = [dataset for dataset in configured if not only or dataset.name in only]
    return _ToCheck(Path(config.data.root), datasets, config.data.max_length, config.data.images == "all")


def run_check(args: argparse.Namespace) -> int:
    """Return 0 without errors; 1 with errors, which are listed."""
    root, datasets, max_length, all_images = _to_check(args.root, args.overrides, args.only)
    processor = None
    if args.model:
        from mslora_cr.models.load import input_processor_in  # This imports transformers.

        processor = input_processor_in(args.model, args.max_length or max_length, all_images)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scan = Scan(args.workers, sys.stderr.isatty(), cache=args.output.with_suffix(".good-images"))
    reports = [check(dataset, root, processor, None if args.no_images else scan) for dataset in datasets]
    print(table(reports))
    if processor is None:
        print("lengths were not checked; give a model folder with --model")
    errors = sum(report.errors for report in reports)
    result = {"root": str(root), "errors": errors, "data_sets": [asdict(report) for report in reports]}
    write_json(args.output, result)
    print(f"{errors} errors; written to {args.output}")
    return 1 if errors else 0
