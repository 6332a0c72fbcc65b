"""The command line: help without torch, errors in a line."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mslora_cr.cli import _parse, main
from mslora_cr.config_file import load_config
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
    "data check",
    "data prepare",
    "data download",
)
COMMANDS += ("model download", "model inspect", "bank export", "bank fit-router", "bank show")


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


def test_an_error_of_the_user_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "x.yaml", "--dryrun"])
    assert "--dryrun" in capsys.readouterr().err
