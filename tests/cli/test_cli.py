"""The command line: help without torch, errors in a line."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from io import TextIOWrapper
from pathlib import Path
from typing import get_args

import pytest
import yaml

from mslora_cr.analysis.analyze import QUESTIONS
from mslora_cr.cli.common import EXTRAS
from mslora_cr.cli.main import _parse, main
from mslora_cr.config.load import load_config
from mslora_cr.config.shipped import find_config
from mslora_cr.evaluation.cells import Stages
from mslora_cr.sweep import plan_sweep
from tests.conftest import method_of_the_page

ROOT = Path(__file__).parents[2]

COMMANDS = (
    "",
    "demo",
    "train",
    "evaluate",
    "score",
    "report",
    "compare",
    "analyze",
    "sweep",
)
COMMANDS += (
    "data",
    "data check",
    "data prepare",
    "data download",
    "model",
    "model download",
    "model inspect",
    "model make",
)
COMMANDS += ("config", "config list", "config show", "config copy")
COMMANDS += ("bank", "bank import", "bank export", "bank fit-router", "bank show")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_imports_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom mslora_cr.cli.main import main\n"
        f"try:\n    main({[*command.split(), '--help']!r})\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_every_package_that_may_be_missing_has_an_extra() -> None:
    """So that a command without it names what to install, and does not end in a traceback."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    homes = {name: {home.lower() for home in known} for name, known in packages_distributions().items()}
    installed = {*sys.stdlib_module_names, "mslora_cr"} | {
        "mlflow",
        "wandb",
        "tensorboard",
    }  # training.report_to asks for them
    for path in (ROOT / "mslora_cr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {(name or "").partition(".")[0] for name in names} - installed:
                assert name in EXTRAS or homes.get(name, set()) & required, f"{path}: {name}"


def test_analyze_without_scipy_names_the_extra(trained_config: Path) -> None:
    code = (
        "import sys\nsys.modules['scipy'] = None\nfrom mslora_cr.cli.main import main\n"
        f"raise SystemExit(main(['analyze', {str(trained_config)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is not installed; pip install 'mslora-cr[eval]'" in done.stderr


def test_help_knows_what_it_cannot_import(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in files that import torch is said a second time."""
    assert f"--stages {{{','.join(get_args(Stages))}}}" in help_of("evaluate", capsys)
    assert f"(default: {QUESTIONS};" in help_of("analyze", capsys)


def documented_commands() -> list[list[str]]:
    """Every command line in the code blocks of the README and the pages."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("mslora-cr ", "bash ")):
                    found.append(shlex.split(line.partition(" && ")[0], comments=True))
    return found


def test_documented_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed, its configuration is there and its overrides fit; scripts hand theirs on to the same parser."""
    (tmp_path / "held.py").write_text(method_of_the_page(), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    commands = documented_commands()
    assert len(commands) > 30
    for words in commands:
        if words[0] == "bash":
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            if "launch.sh" not in script or words[1].endswith("launch.sh"):
                continue
            words = ["mslora-cr", *script.split('launch.sh" ')[1].split()[:2], *words[2:]]
        args = _parse(words[1 : words.index(">") if ">" in words else None])
        if words[1] == "sweep":  # its overrides may belong to one of its methods
            plan_sweep(find_config(args.config, ROOT), args.overrides, args.methods, args.orders, args.seeds)
        elif "overrides" in args and "config" in args and args.config.name not in ("CONFIG", "exams.yaml"):
            # docs/tutorials/your-data.md writes exams.yaml itself, and tests/data/sources/test_convert.py runs it
            load_config(find_config(args.config, ROOT), args.overrides)


# --- the plan ------------------------------------------------------------------------------------------------------


def dry_run(config: Path, *options: str) -> int:
    return main(["train", str(config), "--dry-run", *options])


def test_the_plan_warns_where_training_would_refuse(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_config(trained_config).run_dir
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert dry_run(trained_config) == 0
    assert "warning" not in capsys.readouterr().err
    assert dry_run(trained_config, "lora.rank=8") == 0
    printed = capsys.readouterr().err
    assert f"warning: {run} has finished tasks of another stream (lora.rank: 4 there, 8 here)" in printed
    assert dry_run(trained_config, "lora.rank=8", "--force") == 0
    assert "lora.rank: 4 there, 8 here" in capsys.readouterr().err
    assert dry_run(trained_config, "lora.dropout=0", "--force") == 0
    assert "warning" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    assert dry_run(trained_config, "--task", "PCAM", f"output_dir={tmp_path}") == 0
    assert "PCAM builds on banks that are not trained yet: pathvqa, slake-vqarad" in capsys.readouterr().err


def test_the_plan_of_some_tasks(trained_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(trained_config, "--task", "slake-vqarad") == 0
    plan = capsys.readouterr().out.split("run folder:")[1]
    assert "slake-vqarad" in plan and "PCAM" not in plan and "pathvqa " not in plan
    assert dry_run(trained_config, "--task", "PCAM", "--task", "pathvqa") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.partition("penalties  state\n")[2].splitlines()]
    assert names == ["pathvqa", "PCAM"]
    assert dry_run(trained_config, "tasks=[PCAM, slake-vqarad]", "run=other") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.partition("penalties  state\n")[2].splitlines()]
    assert names == ["PCAM", "slake-vqarad"]
    assert dry_run(trained_config, "--task", "bogus") == 1
    assert "unknown task 'bogus'" in capsys.readouterr().err


def test_the_plan_prints_the_data_sets_of_its_tasks_alone(
    trained_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(trained_config, "tasks=[PCAM, slake-vqarad]", "run=other") == 0
    printed = yaml.safe_load(capsys.readouterr().out.partition("run folder:")[0])
    assert set(printed["datasets"]) == {"PCAM", "slake-vqarad"}


def test_one_rank_prints_the_plan(
    trained_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dry_run(trained_config) == 0
    assert capsys.readouterr().out == ""


# --- a run by its folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["report"], ["analyze"], ["compare", "CONFIG"], ["analyze", "CONFIG", "--against"]]
)
def test_a_folder_that_is_not_its_configurations_is_refused(
    command: list[str], trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration leads to another folder, which would be read instead."""
    run, copy = load_config(trained_config).run_dir, tmp_path / "old"
    shutil.copytree(run, copy)
    words = [str(trained_config) if word == "CONFIG" else word for word in command]
    assert main([*words, str(copy)]) == 1
    message = capsys.readouterr().err
    assert f"{copy}: its config.yaml describes the run folder {run}. " in message
    assert f"or give a configuration with run: old and output_dir: {tmp_path}" in message


def test_a_renamed_run_is_reported_as_what_it_is_now(trained_config: Path, tmp_path: Path) -> None:
    shutil.copytree(load_config(trained_config).run_dir, tmp_path / "old")
    names = ["run=old", f"output_dir={tmp_path}", f"results_dir={tmp_path / 'results'}"]
    assert main(["report", str(tmp_path / "old"), *names]) == 0
    assert (tmp_path / "results" / "old" / "report.html").is_file()


def test_a_relative_run_folder_is_reported_from_where_it_was_made(
    trained_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "checkpoints" / "tiny"
    shutil.copytree(load_config(trained_config).run_dir, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": "checkpoints", "results_dir": "results"}))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "checkpoints/tiny"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["report", str(run)]) == 1
    assert "run this where the run was trained" in capsys.readouterr().err


def test_a_folder_of_no_run_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path}: no config.yaml there; give a configuration or a run folder" in capsys.readouterr().err


# --- the command line ------------------------------------------------------------------------------------------------


def test_overrides_stand_anywhere_and_keep_their_order() -> None:
    sweep = _parse(["sweep", "x.yaml", "seed=1", "--methods", "ewc", "each", "ewc.strength=1", "--jobs", "1", "seed=2"])
    assert (sweep.methods, sweep.overrides) == (["ewc", "each"], ["seed=1", "ewc.strength=1", "seed=2"])
    assert _parse(["sweep", "x.yaml", "--seeds", "1", "2", "tasks.*.epochs=1"]).seeds == [1, 2]
    assert _parse(["analyze", "x.yaml", "--against", "runs/lr=1"]).against == [Path("runs/lr=1")]
    with pytest.raises(SystemExit):  # no abbreviations: which options take several words is known by their names
        _parse(["sweep", "x.yaml", "--meth", "ewc"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train"], "required: CONFIG\n"),
        (["analyze", "x.yaml", "--questions", "-1"], "'-1' is not a number of at least 0"),
        (["ask", "run", "--max-new-tokens", "0"], "'0' is not a number of at least 1"),
        (["evaluate", "x.yaml", "--concurrency", "0"], "'0' is not a number of at least 1"),
        (["data", "convert", "scans", "--frames", "0"], "'0' is not a number of at least 1"),
        (["train", "x.yaml", "--dryrun"], "--dryrun"),
        (["compare", "a", "b", "--at", "own", "lora.rank=3"], "lora.rank=3"),
    ],
)
def test_a_wrong_command_line_is_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["config", "show", "demo"], ["completion", "bash"]], ids=" ".join)
@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away_ends_every_command_quietly(
    command: list[str], buffering: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `mslora-cr completion bash | head -0`, also with PYTHONUNBUFFERED."""
    reading, writing = os.pipe()
    os.close(reading)
    with TextIOWrapper(open(writing, "wb", buffering), write_through=buffering == 0) as output:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", output)
        assert main(command) == 141
    assert capsys.readouterr().err == ""


def test_an_interrupted_command_says_so_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mslora_cr.config.load.load_config", interrupted)
    assert main(["train", "demo"]) == 130
    said = capsys.readouterr()
    assert said.err == "mslora-cr: interrupted; run the same command again to resume\n" and said.out == ""


def test_another_broken_pipe_is_an_error_like_any_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("mslora_cr.config.load.load_config", broken)
    assert main(["train", "demo"]) == 1
    assert "Broken pipe; finished work is kept" in capsys.readouterr().err


# --- refused -------------------------------------------------------------------------------------------------------


def test_an_error_of_the_user_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err
