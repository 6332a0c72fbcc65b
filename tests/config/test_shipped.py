"""Configurations by name, from the clone and from a wheel installed without it."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config, training_fields
from mslora_cr.config.schema import ConfigError
from mslora_cr.config.shipped import DEFAULTS, configurations
from tests.conftest import once

ROOT = Path(__file__).parents[2]


def test_a_name_works_wherever_a_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = load_config("finetune_lora_each", ["training.deepspeed=zero2"])
    assert named == load_config(ROOT / "configs/finetune_lora_each.yaml", ["training.deepspeed=zero2"])
    assert training_fields(named)["deepspeed"] == str(DEFAULTS / "deepspeed" / "zero2.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: demo\nrun: mine\n")
    assert load_config("mine.yaml").run == "mine" and load_config("mine.yaml").lora.rank == 8
    (tmp_path / "demo").write_text("extends: mine.yaml\nrun: a_file_goes_first\n")
    (tmp_path / "mine.yaml").write_text("extends: sweep\n")
    assert load_config("demo").run == "a_file_goes_first"
    for command in (["train", "dmeo", "--dry-run"], ["evaluate", "dmeo"], ["sweep", "dmeo"]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "there is no such file, nor a configuration of that name; did you mean 'demo'?" in error
    assert main(["report", "dmeo"]) == 1
    assert (
        "dmeo: no such configuration, run folder or run in checkpoints/; did you mean 'demo'?"
        in capsys.readouterr().err
    )
    assert "did you mean 'sweep'?" in error_of("configs/sweep.yaml")
    deepspeed = "zero4: cannot be read (there is no such file, nor a DeepSpeed configuration of that name; did you mean"
    with pytest.raises(ConfigError) as caught:
        training_fields(load_config("sweep", ["training.deepspeed=zero4"]))
    assert deepspeed in str(caught.value)


def error_of(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    return str(caught.value)


def test_config_lists_shows_and_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[: len(configurations())]] == list(configurations())
    assert "zero3_offload" in listed
    for name in configurations():
        assert main(["config", "show", name]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        if name not in ("published", "families"):  # they lack what a run's own file adds
            (tmp_path / "shown.yaml").write_text(yaml.safe_dump(printed))
            assert load_config(tmp_path / "shown.yaml") == load_config(name)
    assert main(["config", "show", "zero1"]) == 0
    assert capsys.readouterr().out == (DEFAULTS / "deepspeed" / "zero1.json").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["config", "copy", "finetune_lora_each", "own"]) == 0
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"finetune_lora_each.yaml", "published.yaml"}
    assert load_config("own/finetune_lora_each.yaml") == load_config("finetune_lora_each")
    (tmp_path / "own" / "published.yaml").write_text("mine")
    assert main(["config", "copy", "finetune_mslora_cr_ortho", "own"]) == 1
    assert "published.yaml: already exists with other content" in capsys.readouterr().err
    assert not (tmp_path / "own" / "finetune_mslora_cr_ortho.yaml").exists()
    assert main(["config", "copy", "zero5"]) == 1
    assert "zero5: no configuration of that name; did you mean 'zero" in capsys.readouterr().err


def test_a_configuration_is_copied_to_a_file_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "copy", "finetune_lora_each", "own/my.yaml"]) == 0
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"my.yaml", "published.yaml"}
    assert load_config("own/my.yaml") == load_config("finetune_lora_each")
    assert main(["config", "copy", "zero1", "my.json"]) == 0
    assert (tmp_path / "my.json").read_text() == (DEFAULTS / "deepspeed" / "zero1.json").read_text()
    capsys.readouterr()
    assert main(["config", "copy", "finetune_lora_each", "published.yaml"]) == 1
    assert "finetune_lora_each extends a file of this name" in capsys.readouterr().err
    assert not (tmp_path / "published.yaml").exists()


@pytest.fixture(scope="session")
def installed(shared_tmp: Path) -> Path:
    """The folder of an environment that has the wheel; this one's libraries are on its path, the clone is not."""

    def build(folder: Path) -> None:
        source = folder / "source"
        source.mkdir(parents=True)
        for name in ("mslora_cr", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
            subprocess.run(["cp", "-R", str(ROOT / name), str(source)], check=True)
        pip = [sys.executable, "-m", "pip", "-q", "wheel", str(source), "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--no-index", "-w", str(folder)], check=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        [site] = (folder / "venv" / "lib").glob("python*/site-packages")
        [wheel] = folder.glob("*.whl")
        target = [sys.executable, "-m", "pip", "-q", "--python", str(folder / "venv"), "install", "--no-deps"]
        subprocess.run([*target, "--no-index", str(wheel)], check=True)
        libraries = Path(pytest.__file__).parents[1]  # a plain path: its own .pth files, the clone's too, are not read
        (site / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")

    return once(shared_tmp / "wheel", build)


def run(installed: Path, folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(installed / "venv" / "bin" / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, **options)


def test_the_wheel_needs_no_clone(installed: Path, tmp_path: Path) -> None:
    [wheel] = installed.glob("*.whl")
    names = {name.removeprefix("mslora_cr/") for name in zipfile.ZipFile(wheel).namelist()}
    environment = {
        path.relative_to(ROOT / "mslora_cr").as_posix()
        for path in (ROOT / "mslora_cr").rglob("*")
        if path.suffix in (".yaml", ".json", ".j2", ".py", ".typed")
    }
    assert environment <= names and {"config/defaults/demo.yaml", "config/defaults/deepspeed/zero3.json"} <= environment
    where = run(installed, tmp_path, "python", "-c", "import mslora_cr; print(mslora_cr.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    listed = run(installed, tmp_path, "mslora-cr", "config", "list")
    assert listed.returncode == 0 and "finetune_mslora_cr_ortho" in listed.stdout, listed.stderr
    completed = run(installed, tmp_path, "mslora-cr", "config", "show", "finetune_mslora_cr_ortho")
    assert len(yaml.safe_load(completed.stdout)["tasks"]) == 8
    refused = run(installed, tmp_path, "mslora-cr", "demo", "tasks=[nmi, iu-x-ray]")
    assert "tasks: the demo compares closed questions" in refused.stderr  # it has read its configuration
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """With a smaller stream and an untrained model, as in test_demo.py."""
    small = (
        "import sys; from functools import partial; from mslora_cr import demo; from mslora_cr.cli.main import main\n"
        "demo.make_stream = partial(demo.make_stream, train_images=8, test_images=4)\n"
        "demo.make_tiny_llava_med = partial(demo.make_tiny_llava_med, pretrain_steps=0, progress=False)\n"
        "sys.exit(main(['demo', 'tasks=[pathvqa,PCAM]', 'tasks.*.epochs=0.5', 'evaluation.max_new_tokens=2']))\n"
    )
    done = run(installed, tmp_path, "python", "-c", small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "demo" / "report.html").is_file()
