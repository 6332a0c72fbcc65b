"""Every benchmark of time and memory, one after another, into one file a machine.

    python -m benchmarks.all --json machine.json
    python -m benchmarks.all --size 7b --only step generation --json h200.json

Each is a process of its own. What it prints is shown; FILE has each one's figures under its name, with the command, and
what a benchmark that failed has said at last. docs/explanation/performance.md is made from such files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mslora_cr.utils.files import write_json

SIZED = ("step", "penalty", "folding", "generation", "shared_images", "probabilities", "memory")
"""Those whose model has a size; the others take the same time at any."""
OTHERS = ("startup", "data", "scoring")
AT_7B = {
    "generation": ["--prompt-tokens", "600", "660", "--batches", "16", "64"],
    "shared_images": ["--at-once", "64", "--questions", "256", "--repetitions", "3"],
    "probabilities": ["--at-once", "64", "--questions", "256", "--repetitions", "3"],
    "memory": ["--repetitions", "1"],
}
"""What is changed at 7B, so that each ends within minutes."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="written after each benchmark")
    parser.add_argument("--size", default=None, help="of the model (default: each benchmark's own)")
    parser.add_argument("--repetitions", type=int, metavar="N", help="rounds (default: each benchmark's own)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--only", nargs="+", choices=(*SIZED, *OTHERS), default=(*SIZED, *OTHERS))
    args = parser.parse_args(argv)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.only:
        results[name] = _run(name, _options(name, args))
        write_json(args.json, results)
    return results


def _options(name: str, args: argparse.Namespace) -> list[str]:
    options = []
    if args.size is not None and (name in SIZED or args.size == "tiny"):
        options += ["--size", args.size, *(AT_7B.get(name, []) if args.size == "7b" else [])]
    for option in ("repetitions", "device"):
        value = getattr(args, option)
        options += [] if value is None else [f"--{option}", str(value)]
    return options


def _run(name: str, options: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(file)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "command": " ".join(["python", "-m", f"benchmarks.{name}", *options])}


if __name__ == "__main__":
    sys.exit(any("failed" in result for result in main().values()))
