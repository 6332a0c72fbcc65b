"""`mslora-cr config`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mslora_cr.cli.common import CONFIG_HELP, add_command
from mslora_cr.config.schema import ConfigError
from mslora_cr.config.shipped import configurations, deepspeed_configurations
from mslora_cr.utils.errors import nearest
from mslora_cr.utils.files import write_text


def add_config_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "config",
        "list, show and copy the configurations that the package ships",
        "mslora-cr config list",
        "mslora-cr config show finetune_mslora_cr_ortho",
        "mslora-cr config copy finetune_mslora_cr_ortho .",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = add_command(
        actions, "list", "list them with their purposes; every command accepts their names", "mslora-cr config list"
    )
    action.set_defaults(run=_list)
    action = add_command(
        actions,
        "show",
        "print a configuration as YAML, including what it extends, or a DeepSpeed configuration",
        "mslora-cr config show finetune_mslora_cr_ortho",
        "mslora-cr config show zero2",
    )
    action.add_argument("name", metavar="NAME", help=CONFIG_HELP)
    action.set_defaults(run=_show)
    action = add_command(
        actions,
        "copy",
        "copy a configuration to change it, and the files that it extends",
        "mslora-cr config copy finetune_mslora_cr_ortho",
        "mslora-cr config copy finetune_mslora_cr_ortho my.yaml",
        "mslora-cr config copy zero3 deepspeed/",
    )
    action.add_argument("name", metavar="NAME", help="one of `mslora-cr config list`")
    action.add_argument(
        "target",
        metavar="DIR|FILE",
        type=Path,
        nargs="?",
        default=Path(),
        help="target (%(default)s): a folder, or a file such as my.yaml; the files that it extends go beside it",
    )
    action.set_defaults(run=_copy)


def _list(args: argparse.Namespace) -> int:
    names = configurations()
    width = max(map(len, [*names, *deepspeed_configurations()]))
    for name, path in names.items():
        print(f"{name:<{width}}  {path.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}")
    print("\nfor training.deepspeed:")
    for name in deepspeed_configurations():
        print(f"{name:<{width}}  DeepSpeed, {name.replace('zero', 'ZeRO-').replace('_', ' with ')}")
    return 0


def _show(args: argparse.Namespace) -> int:
    import yaml

    from mslora_cr.config.load import read_layers

    shipped = deepspeed_configurations().get(args.name)
    if shipped is not None:
        print(shipped.read_text(encoding="utf-8"), end="")
    else:
        layers = read_layers(args.name)
        print(yaml.safe_dump(layers, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120), end="")
    return 0


def _copy(args: argparse.Namespace) -> int:
    from mslora_cr.config.load import layers

    shipped = {**deepspeed_configurations(), **configurations()}
    if args.name not in shipped:
        raise ConfigError(f"{args.name}: no configuration of that name{nearest(args.name, shipped)}")
    source = shipped[args.name]
    files = [path for path, _ in layers(source)] if source.suffix == ".yaml" else [source]
    targets = _targets(source, files, args.target)
    for target, file in targets.items():
        if target.exists() and (target.is_dir() or target.read_bytes() != file.read_bytes()):
            raise ConfigError(f"{target}: already exists with other content; choose another folder")
    for target, file in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, file.read_text(encoding="utf-8"))
        print(target)
    return 0


def _targets(source: Path, files: Sequence[Path], target: Path) -> dict[Path, Path]:
    """Return the target of each file: in a folder, or `source` under the name of `target` and the other files beside
    it."""
    endings = (".yaml", ".yml") if source.suffix == ".yaml" else (source.suffix,)
    if target.suffix not in endings or target.is_dir():
        return {target / file.name: file for file in files}
    others = {target.parent / file.name: file for file in files if file != source}
    if target in others:
        raise ConfigError(f"{target}: {source.stem} extends a file of this name; choose another")
    return {target: source, **others}
