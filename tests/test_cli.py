"""The command line: help without torch, errors in a line."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from mslora_cr.cli import _parse, main
from mslora_cr.config_file import load_config
from mslora_cr.evaluation.analyze import QUESTIONS
from mslora_cr.evaluation.evaluate import Stages
from mslora_cr.sweep import plan_sweep

ROOT = Path(__file__).parents[1]

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
COMMANDS += ("data", "data check", "data prepare", "data download", "model", "model download", "model inspect")
COMMANDS += ("bank", "bank import", "bank export", "bank fit-router", "bank show")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_imports_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom mslora_cr.cli import main\n"
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


def test_help_knows_what_it_cannot_import(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in files that import torch is said a second time."""
    assert f"--stages {{{','.join(get_args(Stages))}}}" in help_of("evaluate", capsys)
    assert f"(default: {QUESTIONS};" in help_of("analyze", capsys)


def documented_commands() -> list[list[str]]:
    """Every command line in the code blocks of the README and the pages."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("mslora-cr ", "bash ")):
                    found.append(shlex.split(line.partition(" && ")[0], comments=True))
    return found


def test_documented_commands_are_understood() -> None:
    """Each is parsed, its configuration is there and its overrides fit; scripts hand theirs on to the same parser."""
    commands = documented_commands()
    assert len(commands) > 30
    for words in commands:
        if words[0] == "bash":
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            if "launch.sh" not in script or words[1].endswith("launch.sh"):
                continue
            words = ["mslora-cr", *script.split('launch.sh" ')[1].split()[:2], *words[2:]]
        args = _parse(words[1:])
        if words[1] == "sweep":  # its overrides may belong to one of its methods
            plan_sweep(ROOT / args.config, args.overrides, args.methods, args.orders, args.seeds)
        elif "overrides" in args and "config" in args and args.config.name != "CONFIG":
            load_config(ROOT / args.config, args.overrides)


# --- the plan ------------------------------------------------------------------------------------------------------


def dry_run(config: Path, *options: str) -> int:
    return main(["train", str(config), "--dry-run", *options])


def test_the_plan_warns_where_training_would_refuse(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_config(trained_config).run_dir
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert dry_run(trained_config) == 0
    assert "warning" not in capsys.readouterr().out
    assert dry_run(trained_config, "lora.rank=8") == 0
    printed = capsys.readouterr().out
    assert f"warning: {run} was created with a different configuration (lora.rank: 4 there, 8 here)" in printed
    assert dry_run(trained_config, "lora.rank=8", "--force") == 0
    assert "warning" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    assert dry_run(trained_config, "--task", "PCAM", f"output_dir={tmp_path}") == 0
    assert "PCAM builds on banks that are not trained yet: pathvqa, slake-vqarad" in capsys.readouterr().out


def test_the_plan_of_one_task(trained_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(trained_config, "--task", "slake-vqarad") == 0
    plan = capsys.readouterr().out.split("run folder:")[1]
    assert "slake-vqarad" in plan and "PCAM" not in plan and "pathvqa " not in plan
    assert dry_run(trained_config, "--task", "bogus") == 1
    assert "unknown task 'bogus'" in capsys.readouterr().err


def test_one_rank_prints_the_plan(
    trained_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert dry_run(trained_config) == 0
    assert capsys.readouterr().out == ""


# --- refused -------------------------------------------------------------------------------------------------------


def test_an_error_of_the_user_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "x.yaml", "--dryrun"])
    assert "--dryrun" in capsys.readouterr().err
