"""The command line: help without torch, errors in a line."""

import subprocess
import sys
from pathlib import Path

import pytest

from mslora_cr.cli import main

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


def test_an_error_of_the_user_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "x.yaml", "--dryrun"])
    assert "--dryrun" in capsys.readouterr().err
