"""How long the command line takes to answer, against Python itself and against importing torch and transformers.

    python -m benchmarks.startup
    python -m benchmarks.startup --commands --clock cpu

Each measurement is a process of its own. With `--commands`, beside that what `train`, `evaluate` and `ask` import, and
the same without `mslora_cr.utils.lean_imports`, which leaves out parts of libraries; and `train` and `evaluate` from
start to end on a tiny model, where little else but imports takes time (`benchmarks.profile` has their stages at any
size).
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parse
from benchmarks.profile import tiny_commands

COMMANDS = {
    "python": ["-c", "pass"],
    "import torch, transformers": ["-c", "import torch, transformers"],
    "mslora-cr --help": ["-m", "mslora_cr", "--help"],
    "mslora-cr train --help": ["-m", "mslora_cr", "train", "--help"],
    "everything a training imports": ["-c", "import mslora_cr.stream.train"],
}
IMPORTS = {"train": "mslora_cr.stream.train", "evaluate": "mslora_cr.evaluation.evaluate", "ask": "mslora_cr.api"}
"""The module that imports everything that a command needs."""
LIBRARIES = "import mslora_cr.cli.main; from mslora_cr.cli.common import import_libraries; import_libraries"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse(
        "startup",
        __doc__,
        argv,
        lambda parser: parser.add_argument(
            "--commands", action="store_true", help="train and evaluate a tiny model too, and what both import"
        ),
    )

    def running(arguments: list[str]) -> Callable[[], Any]:
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    variants = {name: running(arguments) for name, arguments in COMMANDS.items()}
    ratios = {
        "help_over_python": ("mslora-cr --help", "python"),
        "libraries_over_help": ("import torch, transformers", "mslora-cr --help"),
    }
    with tempfile.TemporaryDirectory() as folder:
        if setting.args.commands:
            for command, module in IMPORTS.items():
                variants[f"{command} imports"] = running(
                    ["-c", f"{LIBRARIES}(trains={command == 'train'}); import {module}"]
                )
                variants[f"{command} imports, whole"] = running(["-c", f"import mslora_cr.cli.main, {module}"])
                ratios[f"{command}_imports_over_whole"] = (f"{command} imports", f"{command} imports, whole")
            train, evaluate = tiny_commands(Path(folder))
            running(["-m", "mslora_cr", *train])()
            numbers = itertools.count()

            def afresh(command: list[str], place: str) -> Callable[[], Any]:
                """The command with a folder of its own at every call: nothing in it is done already."""
                return lambda: running(["-m", "mslora_cr", *command, f"{place}={folder}/{next(numbers)}"])()

            variants["mslora-cr train, tiny model"] = afresh(train, "output_dir")
            variants["mslora-cr evaluate, tiny model"] = afresh(evaluate, "results_dir")
            ratios["evaluate_over_its_imports"] = ("mslora-cr evaluate, tiny model", "evaluate imports")
            ratios["train_over_its_imports"] = ("mslora-cr train, tiny model", "train imports")
        seconds = setting.interleaved(variants, warm_up=0)
    return finish(setting, seconds, ratios)


if __name__ == "__main__":
    main()
