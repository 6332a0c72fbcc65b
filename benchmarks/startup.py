"""How long the command line takes to answer, against Python itself and against importing torch and transformers.

    python -m benchmarks.startup

Each measurement is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import finish, parse

COMMANDS = {
    "python": ["-c", "pass"],
    "import torch, transformers": ["-c", "import torch, transformers"],
    "mslora-cr --help": ["-m", "mslora_cr", "--help"],
    "mslora-cr train --help": ["-m", "mslora_cr", "train", "--help"],
    "everything a training imports": ["-c", "import mslora_cr.stream.train"],
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("startup", __doc__, argv)

    def running(arguments: list[str]) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    seconds = setting.interleaved({name: running(arguments) for name, arguments in COMMANDS.items()}, warm_up=0)
    return finish(
        setting,
        seconds,
        {
            "help_over_python": ("mslora-cr --help", "python"),
            "libraries_over_help": ("import torch, transformers", "mslora-cr --help"),
        },
    )


if __name__ == "__main__":
    main()
