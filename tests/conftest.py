"""One thread a process, and what most tests need once: a tiny base model, a tiny stream, a run trained on them."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from mslora_cr.cli.main import main
from mslora_cr.synthetic.model import MODEL_FOLDER, make_tiny_llava_med
from mslora_cr.synthetic.stream import make_stream

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "tiny_a"
STEPS = {"pathvqa": 4, "slake-vqarad": 4, "PCAM": 4}
"""Optimizer steps of each task of the tiny stream."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")

ConfigWriter = Callable[..., Path]


def first_in_make_test(*values: Any, first: int = 1) -> list[Any]:
    """Parameters of a test of which `make test` runs the first, and `make test-all` the others too."""
    further = (value if isinstance(value, tuple) else (value,) for value in values[first:])
    return [*values[:first], *(pytest.param(*value, marks=pytest.mark.long) for value in further)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest first, so that no process waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Three collections a task then pass over what was imported."""
    gc.collect()
    gc.freeze()


def once(folder: Path, build: Callable[[Path], Any]) -> Path:
    """The folder, filled by the first of the test processes that asks for it."""
    finished = folder.with_suffix(".finished")
    with FileLock(f"{folder}.lock"):
        if not finished.exists():
            build(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_model(shared_tmp: Path) -> Path:
    """The folder of a tiny LLaVA-Med with random weights."""
    made = once(shared_tmp / "model", lambda folder: make_tiny_llava_med(folder, pretrain_steps=0, progress=False))
    return made / MODEL_FOLDER


@pytest.fixture(scope="session")
def tiny_data(shared_tmp: Path) -> Path:
    """The data root of a tiny stream: 8 training and 4 test pictures per task."""
    return once(shared_tmp / "data", lambda folder: make_stream(folder, train_images=8, test_images=4))


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tiny_data: Path) -> dict[str, Any]:
    """A configuration of three tasks, two of them of one modality; 4 steps a task, a checkpoint every 2.

    Dropout and a learnable weight are on, so that a resumed run needs the random state and the weight's own.
    """
    return {
        "run": "tiny",
        "model": {"path": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": {"root": str(tiny_data), "check_images": False},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.05},
        "regularization": {"alpha": -1, "beta": 0.01},
        "training": {"logging_steps": 1, "save_steps": 2, "disable_tqdm": True},
        "evaluation": {"max_new_tokens": 4, "batch_size": 4},
        "datasets": {
            "pathvqa": {"modality": "pathology", "folder": "PathVQA"},
            "slake-vqarad": {"modality": "radiology", "folder": "Slake-VQARad"},
            "PCAM": {"modality": "pathology", "folder": "PCam"},
        },
        "tasks": [
            {"name": "pathvqa", "epochs": 1, "batch_size": 4, "learning_rate": 0.002},
            {"name": "slake-vqarad", "epochs": 1, "batch_size": 4, "learning_rate": 0.002},
            {"name": "PCAM", "epochs": 2, "batch_size": 4, "learning_rate": 0.002},
        ],
    }


def write_config(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """A run's YAML file in a folder of its own; its run and results folders go there too."""
    places = {"output_dir": str(folder / "checkpoints"), "results_dir": str(folder / "results")}
    path = folder / "run.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**settings, **places, **changes}, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def config_file(tmp_path: Path, tiny_settings: dict[str, Any]) -> ConfigWriter:
    """Writes the tiny configuration, with top-level keys replaced, and returns the file."""
    return lambda **changes: write_config(tmp_path, tiny_settings, **changes)


@pytest.fixture(scope="session")
def trained_config(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Path:
    """The configuration of the tiny stream trained without a break: `checkpoints/tiny` stands beside it. Read only."""

    def build(folder: Path) -> None:
        assert main(["train", str(write_config(folder, tiny_settings))]) == 0

    return once(shared_tmp / "trained", build) / "run.yaml"


def method_of_the_page() -> str:
    """The text of `held.py`, the method that docs/how-to/add-a-method.md adds from outside the package."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    return page.partition("```python\n")[2].partition("```")[0]


def bank_bytes(run_folder: Path) -> dict[str, bytes]:
    """Each bank's weights as they stand in the file."""
    files = sorted(run_folder.glob("banks/*/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}
