"""Where a command's time goes, from its start to its end: imports, digests, loading, folding, steps, saving, answers.

    python -m benchmarks.profile                             # trains and evaluates a tiny model
    python -m benchmarks.profile train CONFIG [KEY=VALUE …]  # any run, at any size
    python -m benchmarks.profile evaluate CONFIG

Each command runs in a process of its own, whose start counts. A stage's seconds are without those of the stages that
run inside it. A finished task trains no more: give a run that has something left to do.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
import yaml

from mslora_cr.utils.files import write_json

STAGES = {
    "train": {
        "digest of the base model": "mslora_cr.stream.train:base_digest",
        "images checked": "mslora_cr.stream.train:check_task_images",
        "base model loaded": "mslora_cr.stream.train:load_base",
        "router's statistics": "mslora_cr.stream.train:router_statistics",
        "samples read": "mslora_cr.stream.train:task_data",
        "frozen banks merged": "mslora_cr.banks.stack:BankStack.set_frozen",
        "bank added": "mslora_cr.banks.stack:BankStack.add_trainable",
        "frozen banks held for penalties": "mslora_cr.losses.bank_penalties:BankPenalties.__init__",
        "trainer set up": "mslora_cr.training.trainer:BankTrainer.__init__",
        "training beside the steps": "mslora_cr.training.trainer:BankTrainer.train",
        "steps": "mslora_cr.training.trainer:BankTrainer.training_step",
        "penalties": "mslora_cr.methods.mslora_cr:WeightedPenalties.step",
        "checkpoints": "mslora_cr.training.trainer:BankTrainer._save_checkpoint",
        "bank saved": "mslora_cr.stream.train:save_task",
        "task taken apart": "mslora_cr.stream.train:release_trainer",
    },
    "evaluate": {
        "base model loaded": "mslora_cr.evaluation.session:load_base",
        "banks merged": "mslora_cr.banks.stack:BankStack.set_frozen",
        "answers": "mslora_cr.evaluation.session:answer_questions",
        "scores": "mslora_cr.evaluation.evaluate:score_file",
        "summary": "mslora_cr.evaluation.evaluate:write_summary",
    },
}
"""By command: a stage's name → the function that it is."""


class Stages:
    """Seconds by stage; those of a stage inside another count for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return call


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="train or evaluate, and its arguments"
    )
    args = parser.parse_args(argv)
    if args.command and args.command[0] not in STAGES:
        parser.error(f"{args.command[0]} has no stages here; choose {' or '.join(STAGES)}")
    if args.inside:
        return _inside(args.command, args.json)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for command in [args.command] if args.command else tiny_commands(Path(folder)):
            file = Path(folder) / "seconds.json"
            subprocess.run(
                [sys.executable, "-m", "benchmarks.profile", "--inside", "--json", str(file), *command], check=True
            )
            results[command[0]] = json.loads(file.read_text(encoding="utf-8"))
            _print(" ".join(command), results[command[0]])
    if args.json is not None:
        write_json(args.json, results)
    return results


def _inside(command: Sequence[str], file: Path) -> dict[str, float]:
    """Run the command in this process, and write the seconds of its stages."""
    stages = Stages()
    born = psutil.Process().create_time()
    for name, place in STAGES[command[0]].items():
        owner, _, attribute = place.replace(":", ".").rpartition(".")
        holder = pkgutil.resolve_name(owner)
        setattr(holder, attribute, stages.timed(name, getattr(holder, attribute)))
    from mslora_cr.cli.main import main as run

    imported = time.time() - born
    status = run(list(command))
    whole = time.time() - born
    if status:
        sys.exit(status)
    seconds = {"Python and imports": imported, **stages.seconds}
    seconds["everything else"] = whole - sum(seconds.values())
    write_json(file, seconds)
    return seconds


def tiny_commands(folder: Path) -> list[list[str]]:
    """Commands that train and evaluate two tasks of a synthetic stream with a tiny model, made here."""
    from mslora_cr.config.shipped import DEFAULTS
    from mslora_cr.synthetic.model import MODEL_FOLDER, make_tiny_llava_med
    from mslora_cr.synthetic.stream import make_stream

    make_stream(folder / "data", train_images=8, test_images=4)
    make_tiny_llava_med(folder / "model", pretrain_steps=0, progress=False)
    settings = yaml.safe_load((DEFAULTS / "demo.yaml").read_text(encoding="utf-8"))
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**settings, "run": "profile", "method": "mslora_cr"}), encoding="utf-8")
    overrides = [f"model.path={folder / 'model' / MODEL_FOLDER}", f"data.root={folder / 'data'}"]
    overrides += ["tasks=[pathvqa, PCAM]"]
    overrides += [f"output_dir={folder / 'checkpoints'}", f"results_dir={folder / 'results'}", "tasks.*.epochs=1"]
    return [[command, str(config), *overrides] for command in STAGES]


def _print(command: str, seconds: dict[str, float]) -> None:
    whole = sum(seconds.values())
    print(f"\n{command}\n{'':<36}{'s':>10}{'share':>9}")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{name:<36}{value:>10.2f}{value / whole:>9.1%}")
    print(f"{'in all':<36}{whole:>10.2f}")


if __name__ == "__main__":
    main()
