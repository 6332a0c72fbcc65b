"""Control characters from files never reach the terminal."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mslora_cr.cli.main import main
from mslora_cr.utils.visible import print_json, visible, visible_results


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain é 胃\n\ttext", "plain é 胃\n\ttext"),
        ("\x1b[2J\x07\r\0", r"\x1b[2J\x07\r\x00"),
        ("\u202egnp.exe \ufeff \ud800", r"\u202egnp.exe \ufeff \ud800"),
        ("a" * 5_000 + " b", "a" * 500 + "…" + "a" * 20 + " b"),
    ],
)
def test_what_is_shown(text: str, printed: str) -> None:
    assert visible(text) == printed


def test_names_from_annotations_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "root" / "PathVQA"
    place.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "\x1b]0;owned\x07"}]
    record = {"id": 0, "image": "\x1b[2Jx.png", "conversations": turns}
    row = {"question_id": 0, "image": "\x1b[2Jy.png", "text": "?", "gt": "\x1b]0;owned\x07", "answer_type": "CLOSED"}
    (place / "train.json").write_text(json.dumps([record]))
    (place / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "raw").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "raw" / "a.png")
    root = str(tmp_path / "root")
    assert main(["data", "prepare", "pathvqa", "--raw", str(tmp_path / "raw"), "--root", root]) == 1
    check = ["data", "check", root, "--only", "pathvqa", "--no-images", "--output", str(tmp_path / "check.json")]
    assert main(check) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and r"\x1b[2Jx.png" in said.out and r"\x1b]0;owned\x07" in said.out


def test_results_are_printed_once_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "list"]) == 0 and capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(["config", "list"]) == 0 and capsys.readouterr().out, "a leftover of a launcher that is gone"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["config", "list"]) == 0 and capsys.readouterr().out, "one process: a whole leftover is ignored"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with visible_results():
        print("a result")
    assert not capsys.readouterr().out


def test_messages_of_other_packages_are_shown_escaped(tmp_path: Path) -> None:
    script = """
import logging, sys, warnings
from mslora_cr.cli.main import main
main(["config", "list", "--quiet"])
handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(logging.Formatter("other: %(message)s"))
logger = logging.getLogger("transformers.some.module")
logger.addHandler(handler)
logger.warning("You are using a model of type %s", "\\x1b[2Jevil\\u202e")
warnings.warn("a file \\x1b]0;title\\x07 of another package")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "other: You are using a model of type \\x1b[2Jevil\\u202e\n" in done.stderr
    assert "a file \\x1b]0;title\\x07 of another" in done.stderr and "\x1b" not in done.stderr


def test_what_a_console_cannot_write_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with visible_results():
        print("4 × 1 – done")
    sys.stdout.flush()
    assert written.getvalue() == b"4 \\xd7 1 \\u2013 done\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_stays_whole_and_valid_on_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, buffer = ["où – 胃\x7f\x85\u202e\xad", "胃" * 2_000], io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
    with visible_results():
        print_json(json.dumps(said, ensure_ascii=False))
    text = buffer.getvalue().decode(encoding)
    assert json.loads(text) == said and text.removesuffix("\n").isprintable()
