"""The six scripts, from the configurations shipped, with nothing but overrides of model, data and length."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import first_in_make_test
from tests.helpers.families import FAMILIES

ROOT = Path(__file__).parents[2]
RUNS = ("lora_each", "mslora_cr_ortho", "mslora_cr_ortho_6task")
BENCHMARKS = ("coin", "mllm_cl", "ucit")
TASKS = {"lora_each": 8, "mslora_cr_ortho": 8, "mslora_cr_ortho_6task": 6}


def script(name: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_every_shipped_run_has_its_two_scripts() -> None:
    found = sorted(path.stem for path in (ROOT / "configs").glob("finetune_*.yaml"))
    assert found == [f"finetune_{run}" for run in sorted(RUNS)]
    scripts = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
    for run in RUNS:
        assert f"finetune_{run}.sh" in scripts
        assert f"eval_{run}.sh" in scripts
    every = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    others = [
        "published",
        "families",
        "open",
        "open_small",
        "demo",
        "sweep",
        "medgemma",
        *BENCHMARKS,
        *(set(FAMILIES) - {"idefics3"}),
    ]
    assert every == sorted(f"{name}.yaml" for name in [*(f"finetune_{run}" for run in RUNS), *others])


@pytest.mark.slow
@pytest.mark.parametrize("run", first_in_make_test("mslora_cr_ortho_6task", "mslora_cr_ortho", "lora_each"))
def test_the_scripts_train_and_evaluate_their_run(run: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    places = [f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    length = ["tasks.*.epochs=0.01", "evaluation.max_new_tokens=2"]
    assets = {"MODEL": str(tiny_model), "DATA": str(tiny_data)}
    script(f"finetune_{run}.sh", "--per-device-batch", "8", *places, *length, **assets)
    [folder] = (tmp_path / "runs").iterdir()
    ledger = json.loads((folder / "ledger.json").read_text())
    assert len(ledger["tasks"]) == TASKS[run]
    assert {entry["steps"] for entry in ledger["tasks"].values()} == {1}
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    shipped = yaml.safe_load((ROOT / "configs" / f"finetune_{run}.yaml").read_text())
    assert [task["batch_size"] for task in resolved["tasks"]] == [task["batch_size"] for task in shipped["tasks"]]
    assert resolved["lora"]["rank"] == 64

    script(f"eval_{run}.sh", *places, *length, **assets)
    [results] = (tmp_path / "results").iterdir()
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert len(evaluation["cells"]) == TASKS[run]
    expected_banks = 1 if run == "lora_each" else TASKS[run]
    assert len(evaluation["cells"][-1]["banks"]) == expected_banks
    for cell in evaluation["cells"]:
        assert (results / cell["task"] / "metrics.txt").is_file()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.long  # `make test` starts every launcher in tests/distributed
@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate"])
def test_a_launcher_trains_with_two_processes(launcher: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    places = [f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    length = ["tasks=[CXP]", "tasks.*.epochs=0.01", "lora.rank=4", "training.dataloader_num_workers=0"]
    assets = {"MODEL": str(tiny_model), "DATA": str(tiny_data), "GPUS": "2", "LAUNCHER": launcher}
    script("finetune_lora_each.sh", "--per-device-batch", "4", *places, *length, **assets)
    [folder] = (tmp_path / "runs").iterdir()
    entry = json.loads((folder / "ledger.json").read_text())["tasks"]["CXP"]
    assert entry["steps"] == 1
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert [task["batch_size"] for task in resolved["tasks"]] == [16]  # 2 processes × 4 samples × 2


# --- what launch.sh starts: a stand-in for Python prints it ------------------------------------------------------------


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a copy of a script, with a `python` that only says how it was called."""
    shutil.copytree(ROOT / "scripts", tmp_path / "clone" / "scripts")
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\n[[ $1 != -c ]] || { echo 4321; exit; }\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = f"{stand_in.parent}:{os.environ['PATH']}"
        command = ["bash", str(tmp_path / "clone" / "scripts" / name), *arguments]
        return subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True)

    return run


EACH = ["mslora_cr", "train", "configs/finetune_lora_each.yaml"]
STARTS = {
    "none": ["-m", *EACH],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *EACH],
    "deepspeed": [
        *("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "4321", "--module"),
        *(*EACH, "training.deepspeed=configs/deepspeed/zero2.json"),
    ],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--multi_gpu", "--main_process_port", "4321", "--module", *EACH),
    ],
}


@pytest.mark.parametrize("launcher", STARTS)
def test_what_each_launcher_starts(launcher: str, launch: Callable[..., subprocess.CompletedProcess]) -> None:
    gpus = "1" if launcher == "none" else "2"
    by_option = launch("finetune_lora_each.sh", "--gpus", gpus, "--launcher", launcher)
    by_environment = launch("finetune_lora_each.sh", GPUS=gpus, LAUNCHER=launcher)
    assert by_option.stdout.splitlines() == by_environment.stdout.splitlines() == STARTS[launcher]


def test_torchrun_may_start_again_by_itself(launch: Callable[..., subprocess.CompletedProcess]) -> None:
    by_option = launch("finetune_lora_each.sh", "--gpus", "2", "--max-restarts", "3")
    by_environment = launch("finetune_lora_each.sh", GPUS="2", MAX_RESTARTS="3")
    start, after = STARTS["torchrun"][:5], STARTS["torchrun"][5:]
    assert by_option.stdout.splitlines() == [*start, "--max_restarts", "3", *after]
    assert by_environment.stdout == by_option.stdout


def test_arguments_reach_the_command(launch: Callable[..., subprocess.CompletedProcess]) -> None:
    """The environment's and the script's own come first, so that those given on the command line win."""
    given = ["--task", "derm", "lora.rank=32", "tasks.*.epochs=1", "run=a b", "model.path=other"]
    train = launch("finetune_lora_each.sh", "--per-device-batch", "8", *given, MODEL="m", DATA="d")
    assert train.stdout.splitlines() == [
        *("-m", *EACH, *given[:2], "model.path=m", "data.root=d", "training.per_device_train_batch_size=8", *given[2:])
    ]
    evaluate = launch("eval_mslora_cr_ortho.sh", "--banks", "checkpoints", PER_DEVICE_BATCH="4", DEEPSPEED="x.json")
    assert evaluate.stdout.splitlines() == [
        *("-m", "mslora_cr", "evaluate", "configs/finetune_mslora_cr_ortho.yaml", "--banks", "checkpoints"),
        "evaluation.batch_size=4",
    ]
    routers = launch("launch.sh", "bank", "fit-router", "c.yaml", "--gpus", "1", MODEL="m")  # a command of two words
    assert routers.stdout.splitlines() == ["-m", "mslora_cr", "bank", "fit-router", "c.yaml", "model.path=m"]
    nodes = ["--hosts", "2", "--host-rank", "0", "--master", "node1"]
    several = launch("launch_multinode.sh", *EACH[1:], *nodes, "model.path=other", MODEL="m", DATA="d")
    assert several.stdout.splitlines()[-7:] == ["-m", *EACH, "model.path=m", "data.root=d", "model.path=other"]


def test_deepspeed_on_one_gpu_has_a_launcher(launch: Callable[..., subprocess.CompletedProcess]) -> None:
    by_option = launch("finetune_lora_each.sh", "--gpus", "1", "--deepspeed", "x.json")
    by_environment = launch("finetune_lora_each.sh", GPUS="1", DEEPSPEED="x.json")
    expected = [word.replace("2", "1") for word in STARTS["torchrun"]] + ["training.deepspeed=x.json"]
    assert by_option.stdout.splitlines() == by_environment.stdout.splitlines() == expected


@pytest.mark.parametrize(("visible", "count"), [("", 1), ("3", 1), ("0,2,5", 3)])
def test_the_visible_gpus_are_taken(
    visible: str, count: int, launch: Callable[..., subprocess.CompletedProcess]
) -> None:
    words = launch("finetune_lora_each.sh", CUDA_VISIBLE_DEVICES=visible).stdout.splitlines()
    assert words == (STARTS["none"] if count == 1 else [word.replace("2", str(count)) for word in STARTS["torchrun"]])
    chosen = launch("finetune_lora_each.sh", "--launcher", "deepspeed", "--gpus", "1", CUDA_VISIBLE_DEVICES="5,7")
    assert "localhost:5" in chosen.stdout.splitlines() and "--num_gpus" not in chosen.stdout
    nodes = ["--hosts", "2", "--host-rank", "0", "--master", "node1"]
    several = launch("launch_multinode.sh", *EACH[1:], *nodes, CUDA_VISIBLE_DEVICES=visible).stdout.splitlines()
    assert several[several.index("--nproc_per_node") + 1] == str(count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2", "--max-restarts", "-1"], "--max-restarts is '-1'"),
        (["--gpus", "1", "--max-restarts", "1"], "--max-restarts is torchrun's; the launcher is none"),
        (["--launcher", "mpirun"], "unknown launcher 'mpirun'"),
        (["--gpus", "two"], "--gpus is 'two'"),
        (["--gpus", "0"], "--gpus is '0'"),
        (["--gpus", "4", "--launcher", "none"], "launcher none starts one process, not 4"),
        (["--per-device-batch"], "--per-device-batch needs a value"),
    ],
)
def test_launch_refuses(arguments: list[str], message: str, launch: Callable[..., subprocess.CompletedProcess]) -> None:
    refused = launch("finetune_lora_each.sh", *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr


@pytest.mark.parametrize("gpus", ["abc", "0"])
def test_several_hosts_refuse_a_senseless_number(gpus: str, launch: Callable[..., subprocess.CompletedProcess]) -> None:
    refused = launch("launch_multinode.sh", *EACH[1:], "--gpus", gpus)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"launch_multinode.sh: --gpus is '{gpus}'" in refused.stderr


def test_launch_says_what_it_takes(launch: Callable[..., subprocess.CompletedProcess]) -> None:
    for name, arguments in (("launch.sh", ["--help"]), ("finetune_lora_each.sh", ["-h"])):
        launched = launch(name, *arguments)
        assert launched.returncode == 0
        assert "--per-device-batch" in launched.stdout and "resumes" in launched.stdout
    assert "MODEL, DATA" in launch("launch_multinode.sh", "--help").stdout
    assert launch("launch.sh").returncode == 2


# --- link_assets.sh: its own tests are in tests/repo/test_link_assets.py -----------------------------------------------


def test_relative_assets_are_those_of_the_caller(tmp_path: Path) -> None:
    """The script itself goes to the clone."""
    shutil.copytree(ROOT / "scripts", tmp_path / "clone" / "scripts")
    (tmp_path / "assets" / "model").mkdir(parents=True)
    (tmp_path / "assets" / "data").mkdir()
    (tmp_path / "clone" / "data").mkdir()
    for place in (tmp_path, tmp_path / "assets"):
        environment = {"PATH": os.environ["PATH"], "MSLORA_DATA": os.path.relpath(tmp_path / "assets" / "data", place)}
        command = ["bash", str(tmp_path / "clone" / "scripts" / "link_assets.sh")]
        subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert (tmp_path / "clone" / "data" / "MSLoRA_CR").readlink() == tmp_path / "assets" / "data"
