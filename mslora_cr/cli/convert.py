"""`mslora-cr data convert`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mslora_cr.cli.common import add_command, count, positive, share, typed

if TYPE_CHECKING:
    from mslora_cr.data.sources.convert import Converted
    from mslora_cr.data.sources.rendering import Rendering

log = logging.getLogger(__name__)
MEDGEMMA_IMAGE = 260
"""Positions of an image: 256 of its tower, one marker on either side, and one empty line before and after."""
MEDGEMMA_POSITIONS = 131_072
"""The most positions of a prompt."""
TEXT_POSITIONS = 512
"""Positions reserved for the question and the answer."""

MOST_LOST = 0.5
"""If a larger share of the rows is left out, the command fails, so that a script notices."""


def add_convert(actions: argparse._SubParsersAction) -> None:
    parser = add_command(
        actions,
        "convert",
        "convert your own data into the folder layout that training reads: a table (CSV, TSV; VLMEvalKit's too), "
        "ShareGPT conversations or lists of questions (JSON; OmniMedVQA's too), a folder that Hugging Face datasets "
        "saved, images in folders named by class, boxes of PASCAL-VOC or COCO, or DICOM and NIfTI files alone, which "
        "become PNG",
        "mslora-cr data convert findings.csv --images scans/ --group patient --output data/Findings",
        "mslora-cr data convert labels.csv --ask 'Which lesion is it?' --answer label --closed --output data/Skin",
        "mslora-cr data convert chats.json --output data/Chats",
        "mslora-cr data convert scans/ --window 40 400 --frames 8 --output data/png     # images alone",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder to convert")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the new data set's folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where image names start (default: next to SOURCE)")
    for name, default in (("image", "image"), ("question", "question"), ("answer", "answer")):
        parser.add_argument(f"--{name}", default=default, metavar="COLUMN", help=f"column of the {name} (%(default)s)")
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="column that keeps rows on one side of the split (default: patient, patient_id, subject or subject_id, "
        "however written, if there is one; else DICOM's PatientID; rows that share an image always stay together)",
    )
    parser.add_argument("--split", metavar="COLUMN", help="column that says train, validation or test")
    parser.add_argument("--answer-type", metavar="COLUMN", help="column that says open or closed")
    parser.add_argument(
        "--attributes",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="columns that describe patient and image, such as sex, age and site: scores are reported by group",
    )
    parser.add_argument(
        "--options",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="columns with an option each, or one column with all, as a list or between | or ; (default: A, B, C, …)",
    )
    parser.add_argument(
        "--ask", type=typed, metavar="TEXT", help="ask this of every image, instead of a question column"
    )
    parser.add_argument(
        "--closed", action="store_true", help="all questions are closed (default: those answered yes or no)"
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("CENTER", "WIDTH"),
        help="window of DICOM, NIfTI and images of more than 8 bits, in their units, e.g. 40 400 (default: the file's "
        "own, else its whole range)",
    )
    parser.add_argument(
        "--ct-windows",
        choices=("medgemma",),
        help="three windows of CT as red, green and blue, as MedGemma was trained (widths and levels 2250/-100, 350/40 "
        "and 80/40), and at most 85 slices unless --frames says otherwise",
    )
    parser.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help="at most N frames, slices or pages of a file, evenly spaced (default: all)",
    )
    parser.add_argument("--test-share", type=share, default=0.2, metavar="X", help="share of test rows (%(default)s)")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the split (%(default)s)")
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Return 0 if converted; 1 if converted, but many rows are left out."""
    from mslora_cr.data.sources.convert import convert_images, holds_questions

    rendering, progress = _rendering(args), sys.stderr.isatty()
    if holds_questions(args.source):
        converted = _convert_rows(args, rendering, progress)
    else:
        converted = convert_images(args.source, args.output, rendering, progress)
        print(f"{converted.rows:,} files")
    print(f"{converted.images:,} images in {args.output}")
    _say_what_to_know(converted)
    positions = MEDGEMMA_IMAGE * converted.most_images if args.ct_windows else 0
    if positions:
        _say_positions(converted.most_images, positions)
    _say_what_is_left_out(converted)
    if converted.train:
        _say_next(converted, args.output, positions)
    if converted.lost > MOST_LOST:
        what = "rows" if converted.train else "files"
        log.warning("%.0f %% of the %s are left out; see the reasons above", 100 * converted.lost, what)
        return 1
    return 0


def _rendering(args: argparse.Namespace) -> Rendering:
    from mslora_cr.data.records import DataError
    from mslora_cr.data.sources.rendering import MEDGEMMA_FRAMES, MEDGEMMA_WINDOWS, Rendering

    if args.ct_windows and args.window:
        raise DataError("--ct-windows already sets three windows: leave --window out")
    if args.ct_windows:
        return Rendering(None, args.frames or MEDGEMMA_FRAMES, MEDGEMMA_WINDOWS)
    return Rendering(tuple(args.window) if args.window else None, args.frames)


def _convert_rows(args: argparse.Namespace, rendering: Rendering, progress: bool) -> Converted:
    from mslora_cr.data.rows.read import Columns
    from mslora_cr.data.sources.convert import Split, convert

    columns = Columns(
        args.image,
        args.question,
        args.answer,
        args.group,
        args.split,
        args.answer_type,
        tuple(args.attributes),
        tuple(args.options),
    )
    split = Split(args.test_share, args.seed)
    converted = convert(
        args.source, args.output, columns, args.ask, args.images, rendering, split, args.closed, progress
    )
    validation = f"{converted.validation:,} for validation, " if converted.validation else ""
    print(
        f"{converted.rows:,} rows: {converted.train:,} for training, {validation}{converted.test:,} for testing, "
        f"by {converted.grouped_by}"
    )
    print(f"split: {converted.split_by}")
    return converted


def _say_what_to_know(converted: Converted) -> None:
    if converted.shared_groups:
        shared = ", ".join(converted.shared_groups[:5])
        count = len(converted.shared_groups)
        log.warning("%d patients or images are on both sides of the source's split, such as %s", count, shared)
    for remark, files in converted.noted.items():
        print(f"{len(files):,} files: {remark}, such as {files[0]}")
    if converted.several:
        print(
            f"{converted.several:,} rows have several images. The model sees only the first of them unless the "
            "configuration has data.images: all; --frames 1 keeps the middle one of each file"
        )


def _say_positions(images: int, positions: int) -> None:
    print(
        f"up to {images} images per row: {positions:,} positions of MedGemma, at {MEDGEMMA_IMAGE} an image, before the "
        f"question; it has {MEDGEMMA_POSITIONS:,}"
    )
    if positions > MEDGEMMA_POSITIONS - TEXT_POSITIONS:
        log.warning("MedGemma has too few positions for so many images: choose fewer with --frames")


def _say_what_is_left_out(converted: Converted) -> None:
    for remark in converted.remarks:
        log.warning("%s", remark)
    if converted.without_patient:
        print(f"rows without a patient, kept together by image: {_of(converted.without_patient, converted.rows)}")
    for what, reasons in (("left out", converted.left_out), ("left out of rows that stay", converted.left_out_parts)):
        for reason, rows in reasons.items():
            print(f"{what}, {reason}: {_of(len(rows), converted.rows)}")
            for row in rows[:5]:
                print(f"  {row}")


def _say_next(converted: Converted, output: Path, positions: int) -> None:
    length = f", max_length: {positions + TEXT_POSITIONS}" if positions else ""
    print(
        f"\nIn a configuration:\n"
        f"  data: {{root: {output.parent}{', images: all' if converted.several else ''}{length}}}\n"
        f"  datasets: {{{output.name}: {{modality: MODALITY, folder: {output.name}}}}}\n"
        f"  tasks: [{{name: {output.name}, epochs: 3, batch_size: 16, learning_rate: 2e-4}}]\n"
        f"Next: mslora-cr data check CONFIG"
    )


def _of(count: int, rows: int) -> str:
    """Return a count with its share; a plain count if it counts files and not rows."""
    return f"{count:,} ({count / rows:.1%})" if count <= rows else f"{count:,}"
