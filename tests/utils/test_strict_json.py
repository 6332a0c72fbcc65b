"""Every JSON file is read by one strict reader; what it refuses is named with the file."""

import os
from pathlib import Path

import pytest

from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.evaluation.score import read_answers
from mslora_cr.utils.files import append_to, replacing_folder, write_json
from mslora_cr.utils.strict_json import JsonError, read_object

REFUSED = {
    '{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' appears twice",
    '{"a": NaN}': "NaN is not JSON",
    '{"a": -Infinity}': "-Infinity is not JSON",
    '{"a": 1e999}': "too large a number",
    f'{{"a": 1{"0" * 400}}}': "digits is too large",
    f'{{"a": {"[" * 100_000}}}': "nested too deeply",
    '{"a": ': "not valid JSON",
    '{"a": "\x1b[31m"}': "not valid JSON",
    "[]": "expected an object",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(JsonError) as error:
        read_object(path)
    message = str(error.value)
    assert message.startswith(str(path)) and REFUSED[text] in message
    assert len(message.splitlines()) == 1 and "\x1b" not in message


def test_other_files_than_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b'{"a": "\xff"}', b"{\0}\0"):  # the second is UTF-16 without a mark
        path.write_bytes(content)
        with pytest.raises(JsonError, match=r"file\.json: not UTF-8"):
            read_object(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(JsonError, match=r"fifo: cannot be read \(not a regular file"):
        read_object(tmp_path / "fifo")
    with pytest.raises(JsonError, match="gone: cannot be read"):
        read_object(tmp_path / "gone")


def test_a_key_that_appears_twice_is_refused_alike_in_annotations_and_answers(tmp_path: Path) -> None:
    question = '{"question_id": 1, "question_id": 2, "image": "a.png", "text": "q", "gt": "a", "answer_type": "OPEN"}'
    (tmp_path / "test.jsonl").write_text(question)
    (tmp_path / "train.json").write_text('[{"id": 1, "id": 2, "conversations": []}]')
    for read in (
        lambda: TestRecords(tmp_path / "test.jsonl"),
        lambda: TrainingRecords(tmp_path / "train.json"),
        lambda: read_answers(tmp_path / "test.jsonl"),
    ):
        with pytest.raises(DataError, match="appears twice"):
            read()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "link.json"
    outside.write_text("theirs")
    link.symlink_to(outside)
    with pytest.raises(ValueError, match="is a link"):
        append_to(link)
    write_json(link, {})
    assert outside.read_text() == "theirs" and not link.is_symlink()


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    dead = tmp_path / f".bank.{2**22 + 1}-0123456789abcdef.tmp"
    living = tmp_path / f".bank.{os.getppid()}-0123456789abcdef.tmp"
    other = tmp_path / ".bank.tmp"
    for folder in (dead, living, other):
        folder.mkdir()
    with replacing_folder(tmp_path / "bank") as staging:
        (staging / "file").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"bank", living.name, other.name}
    assert (tmp_path / "bank" / "file").read_text() == "x"
