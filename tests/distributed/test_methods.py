"""Each way to train, under DDP and every ZeRO stage: two processes give the numbers of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import method_names
from mslora_cr.stream import train as stream
from tests.conftest import first_in_make_test, once, write_config
from tests.distributed.conftest import ADAM_EPSILON, FIXED, WITHOUT_DROPOUT
from tests.distributed.launch import STAGES, compare_runs, deepspeed_file, deviation, launch

TASKS = ("pathvqa", "slake-vqarad")
SETTINGS: Mapping[str, dict[str, Any]] = {
    "each": {},
    "sequential": {},
    "incremental": {},
    "olora": {"lambda_1": 0.5, "lambda_2": 0.1},
    "ewc": {"strength": 1e4, "fisher_batches": 2},
    "lwf": {},
    "inflora": {"samples": 3, "tokens": 8},
    "keeplora": {"samples": 8, "tokens": 16},  # of three samples, directions are of nearly equal energy, and turn
    "reglora": {"strength": 10.0},
    "mr_lora": {"examples": 3},
    "hide_llava": {},
    "sd_lora": {},
    "replay": {"buffer_size": 4},
    "moe_lora": {"experts": 2},
    "joint": {},
    "projector": {},
}
PROJECTOR = "projector"
"""`sequential` that trains the projector too."""
BASES = ("inflora", "keeplora")
"""Methods that keep the basis of a space."""
SHARED = ("each", "sequential", "incremental", "olora", "reglora", "hide_llava", "joint", "mr_lora", "replay")
"""Methods whose passes are those of mslora_cr: the cross entropy of a task's records and others, with a penalty or without,
and a router's statistics. `make test` leaves them to test_exactness.py."""
ACCUMULATED = ("lwf",)
"""In several micro-batches an update: what the trainer's own code averages over them."""


def test_every_method_that_trains_is_tried() -> None:
    """test_exactness.py has mslora_cr."""
    assert set(method_names()) - {"mslora_cr", "zero_shot"} == SETTINGS.keys() - {PROJECTOR}


def configure(folder: Path, settings: dict[str, Any], method: str, otherwise: bool = False) -> Path:
    """A run of two tasks, two updates of four samples each; `otherwise`: in several micro-batches where it is not so."""
    section = {method: SETTINGS[method]} if SETTINGS[method] else {}
    lora = WITHOUT_DROPOUT | ({"projector_learning_rate": 1e-3} if method == PROJECTOR else {})
    at_once = 1 if (method in ACCUMULATED) != otherwise else 4
    exact = {"adam_epsilon": ADAM_EPSILON, "per_device_train_batch_size": at_once}
    changes = {
        "lora": lora,
        "regularization": FIXED,
        "training": {**settings["training"], **exact, "save_strategy": "no"},
        "tasks": [{**task, "epochs": 0.5} for task in settings["tasks"] if task["name"] in TASKS],
    }
    name = "sequential" if method == PROJECTOR else method
    return write_config(folder, settings, method=name, **changes, **section)


def train_these_too(commands: list[tuple[Path, list[str]]]) -> None:
    """Let one launch train other configurations after its own; a launch for each would take most of the time."""
    train = stream.train

    def train_all(*args: Any, **kwargs: Any) -> None:
        train(*args, **kwargs)
        for config, overrides in commands:
            train(load_config(config, overrides))

    stream.train = train_all  # type: ignore[assignment]


@pytest.fixture(scope="module")
def trained(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Callable[[str, str], Path]:
    """The run folder of a method under a stage, `one` being a single process."""

    def alone(method: str, otherwise: bool) -> Path:
        def build(folder: Path) -> None:
            assert main(["train", str(configure(folder, tiny_settings, method, otherwise))]) == 0

        return once(shared_tmp / f"method-{otherwise}-{method}", build)

    def together(stage: str, shared: bool) -> Path:
        def build(folder: Path) -> None:
            methods = [method for method in SETTINGS if (method in SHARED) is shared]
            configs = [configure(folder / method, tiny_settings, method) for method in methods]
            override = deepspeed_file(stage, folder)
            others = [(config, override) for config in configs[1:]]
            launch(["train", configs[0], *override], before=partial(train_these_too, others))

        return once(shared_tmp / f"methods-{stage}-{shared}", build)

    def run_folder(stage: str, method: str) -> Path:
        folder = together(stage, method in SHARED) / method if stage in STAGES else alone(method, stage == "otherwise")
        return folder / "checkpoints" / "tiny"

    return run_folder


@pytest.mark.parametrize("stage", first_in_make_test("zero3", "ddp", "zero1", "zero2"))
@pytest.mark.parametrize(
    "method", first_in_make_test(*sorted(SETTINGS, key=SHARED.__contains__), first=len(SETTINGS) - len(SHARED))
)
def test_two_processes_give_the_numbers_of_one(trained: Callable[[str, str], Path], stage: str, method: str) -> None:
    compare(method, trained(stage, method), trained("one", method))


@pytest.mark.parametrize(
    "method", first_in_make_test(*ACCUMULATED, *(name for name in SETTINGS if name not in ACCUMULATED))
)
def test_micro_batches_give_the_numbers_of_one_batch(trained: Callable[[str, str], Path], method: str) -> None:
    compare(method, trained("otherwise", method), trained("one", method))


def compare(method: str, two: Path, one: Path) -> None:
    """Every logged term, bank and state of a task."""
    compare_runs(two, one, TASKS[:1] if method == "joint" else TASKS)
    ours, theirs = ([load_file(file) for file in sorted(run.glob("banks/*/memory.safetensors"))] for run in (two, one))
    assert len(ours) == len(theirs) == (2 if method in ("ewc", "replay", *BASES) else 0)
    if method in BASES:  # directions of equal energy may turn into each other; what they span is kept
        ours, theirs = ([{name: m @ m.T for name, m in state.items()} for state in run] for run in (ours, theirs))
    assert all(deviation(mine, other) <= 1e-5 for mine, other in zip(ours, theirs, strict=True))
