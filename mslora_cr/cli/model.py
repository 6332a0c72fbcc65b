"""`mslora-cr model`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mslora_cr.cli.common import add_command, add_config, add_lock, announce, config_of, import_libraries
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.download import MODELS, download
from mslora_cr.utils.errors import nearest
from mslora_cr.utils.visible import print_json


def add_model(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "model",
        "download, inspect and make base models",
        "mslora-cr model download",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = add_command(
        actions,
        "download",
        "download the base model, CLIP and the published checkpoints from the Hugging Face Hub",
        "mslora-cr model download",
        "mslora-cr model download checkpoints",
    )
    add_model_download_arguments(action)
    action.set_defaults(run=run_model_download)
    action = add_command(
        actions,
        "inspect",
        "show the contents of a base model, the layers that a bank adapts, and how LLaVA-Med's two vision towers "
        "differ",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5",
        "mslora-cr model inspect pretrained_models/llava_med_v1.5 --all",
    )
    action.add_argument("path", type=Path, metavar="MODEL", help="base model folder")
    action.add_argument(
        "--all", action="store_true", help="list every tensor's difference instead of the largest eight"
    )
    action.set_defaults(run=_inspect)
    action = add_command(
        actions,
        "make",
        "make a small base model for a stream of real pictures, from scratch on a CPU: its tower learns from real "
        "pictures that no task uses, its tokenizer from the words of the stream",
        "mslora-cr model make open_small --raw downloads/pretraining",
    )
    add_config(action)
    action.add_argument(
        "--raw",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="clones or archives of the pictures' repositories, or folders that hold them",
    )
    action.set_defaults(run=_make)


def _inspect(args: argparse.Namespace) -> int:
    import_libraries()
    from mslora_cr.models.inspect import inspect

    comparison = inspect(args.path)
    if not args.all and "towers" in comparison:
        differences = comparison["towers"].pop("differences", {})
        worst = sorted(differences.items(), key=lambda item: -item[1] if isinstance(item[1], float) else float("-inf"))
        comparison["towers"]["largest_differences"] = dict(worst[:8])
    print_json(json.dumps(comparison, indent=2, ensure_ascii=False))
    return 0


def _make(args: argparse.Namespace) -> int:
    config = config_of(args)
    import_libraries()
    from mslora_cr.synthetic.small import make_small_llava

    print(f"base model: {make_small_llava(config, args.raw)}")
    return 0


def add_model_download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(MODELS)}; all by default")
    parser.add_argument("--root", type=Path, default=Path("pretrained_models"), help="folder for models (%(default)s)")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="folder for checkpoints (%(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit (main); requires a single NAME")
    add_lock(parser)


def run_model_download(args: argparse.Namespace) -> int:
    names: Sequence[str] = args.names or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise DataError(f"unknown model {name!r}{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    if args.revision and len(names) != 1:
        raise DataError("--revision belongs to one repository: name exactly one model")
    for name in names:
        folder = args.checkpoints if name == "checkpoints" else args.root
        announce(MODELS[name], folder)
        download(MODELS[name], folder, args.revision, lock=args.lock, update=args.update)
    return 0
