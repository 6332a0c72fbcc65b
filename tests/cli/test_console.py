"""What a command shows of its progress and its end."""

import argparse
import logging
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from mslora_cr.cli.common import typed
from mslora_cr.cli.main import main
from mslora_cr.data.images import inspect_images
from mslora_cr.utils import progress as module
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.progress import progress_bar


def test_without_a_terminal_there_are_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in progress_bar(range(50), desc="quick", unit="answer"):
        pass
    assert capsys.readouterr().err == ""  # sooner done than a line is due
    monkeypatch.setattr(module, "SECONDS", 0.0)
    for _ in progress_bar(range(3), desc="slow", unit="answer"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("slow: 3 of 3 in 00:0") and len(lines) == len(set(lines))
    assert all(re.fullmatch(r"slow: \d of 3 in [\d:]+, \S+ left", line) for line in lines)


def test_a_log_file_holds_no_code_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)
    for _ in progress_bar(range(2), desc="outer", unit="task"):
        with progress_bar(range(2), desc="inner", unit="step") as bar:
            for _ in bar:
                logging.getLogger("mslora_cr").warning("between")
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    inspect_images([tmp_path / "one.png"], workers=1, progress=True)
    said = capsys.readouterr().err
    assert "outer: 2 of 2" in said and "inner: 2 of 2" in said and "images: 1 of 1" in said
    assert not set(said) & {"\r", "\x1b"}


def test_training_and_evaluation_end_with_what_was_made(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(trained_config), f"results_dir={tmp_path}", "tasks=[pathvqa,slake-vqarad]"]
    assert main(command) == 0
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert re.search(
        r"task +stage +questions +exact choice +closed, letters found +F1, open +closed, against guessing\n", said
    )
    assert re.search(r"pathvqa +1 +8 +\d+\.\d +\d+\.\d +\d+\.\d( .*)?\n", said)
    assert re.search(r"closed, letters found: own stage \d+\.\d\n", said)
    assert f"next: mslora-cr report {trained_config}" in said
    assert "\r" not in said  # no bar where nobody watches


@pytest.mark.parametrize(("words", "near"), [(["evalute"], "evaluate"), (["data", "convrt"], "convert")])
def test_the_nearest_command_is_named(words: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert f"did you mean {near!r}?" in capsys.readouterr().err


def test_a_shell_completes_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    check = f"{script}\nCOMP_WORDS=(mslora-cr ev); COMP_CWORD=1; _shtab_mslora_cr; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", check], capture_output=True, text=True)
    assert done.stdout.split() == ["evaluate"], done.stderr


def test_the_commands_for_finished_runs_take_a_runs_name(
    trained_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained_config.parent)
    assert main(["report", "tiny", f"results_dir={tmp_path}"]) == 0
    assert (tmp_path / "tiny" / "report.html").is_file()
    assert main(["compare", "tyni", "tiny"]) == 1
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def test_a_question_of_a_console_without_utf_8_is_read_as_utf_8() -> None:
    """Under `LANG=C`, Python keeps each byte beyond ASCII as half of a surrogate pair."""
    assert typed("\udcc3\udc96dem?") == "Ödem?" and typed("Ödem?") == "Ödem?"
    with pytest.raises(UserError, match="not a text in UTF-8"):
        typed("\udcff?")


def test_what_a_launcher_and_a_shell_left_behind_decides_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {"RANK": "1", "WORLD_SIZE": "2", "NVIDIA_TF32_OVERRIDE": "1", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert main(["config", "list"]) == 0
    captured = capsys.readouterr()
    assert "zero2" in captured.out and not left.keys() & os.environ.keys()
    assert "sets NVIDIA_TF32_OVERRIDE=1, ONEDNN_DEFAULT_FPMATH_MODE=BF16, which is ignored" in captured.err
    assert "sets RANK=1, WORLD_SIZE=2, which is ignored: this command runs as one process" in captured.err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["config", "list"]) == 0 and not capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_file_system_cannot_hold(
    encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise UnicodeEncodeError(encoding, "a\u2013b", 1, 2, "x")

    monkeypatch.setattr("mslora_cr.cli.config._list", fail)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)
    if encoding == "utf-8":  # a fault of the program
        with pytest.raises(UnicodeEncodeError):
            main(["config", "list"])
        return
    assert main(["config", "list"]) == 1
    assert "where names are in ascii; set PYTHONUTF8=1" in capsys.readouterr().err
