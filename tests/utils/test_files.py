"""A file is replaced whole or not at all, with the rights that any new file gets."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mslora_cr.utils.files import append_to, hidden_folder, replacing, replacing_folder, resumable


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path and partial.name.startswith(".")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["the block", "the flush"])
def test_a_failure_leaves_what_was_there(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    path = tmp_path / "file.json"
    path.write_text("old")
    if broken == "the flush":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"), replacing(path) as partial:
        partial.write_text("new")
        if broken == "the block":
            fail(0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, shared=True) as first, replacing(path, shared=True) as second:
        first.write_text("first" * 100)
        second.write_text("second")
    assert path.read_text() == "first" * 100


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_rights_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "file") as partial:
            partial.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_rights_follow_the_umask_whatever_the_library_gives(mask: int, tmp_path: Path) -> None:
    """safetensors makes files that only their owner reads."""
    before = os.umask(mask)
    try:
        with replacing_folder(tmp_path / "bank") as folder:
            save_file({"a": torch.zeros(1)}, folder / "adapter.safetensors")
        with replacing(tmp_path / "router.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    for file in (tmp_path / "bank" / "adapter.safetensors", tmp_path / "router.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    with replacing(path) as partial:
        partial.write_text("x")
    assert path.read_text() == "x"


def test_what_a_killed_process_left_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with resumable(path, "ab") as first:
        first.write(b"half")
    with resumable(path, "ab") as again, resumable(path, "cd") as other:
        assert (again.name, again.tell(), other.tell()) == (first.name, 4, 0)
        assert Path(again.name).parent == tmp_path and other.name != first.name


@pytest.mark.parametrize("kind", ["link", "other name", "fifo", "folder"])
def test_what_is_no_plain_file_of_ours_is_not_gone_on_with(kind: str, tmp_path: Path) -> None:
    path, outside = tmp_path / "file", tmp_path / "outside"
    outside.write_text("mine")
    with resumable(path, "ab") as first:
        planted = Path(first.name)
    planted.unlink()
    if kind == "link":
        planted.symlink_to(outside)
    elif kind == "other name":
        planted.hardlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    with resumable(path, "ab") as file:
        file.write(b"x")
    assert file.name != str(planted) and outside.read_text() == "mine"


def test_nothing_is_added_to_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="not a regular file"):
        append_to(tmp_path / "log")


def test_a_hidden_folder_is_gone_behind_the_block(tmp_path: Path) -> None:
    dead = next(pid for pid in range(2**22 - 1, 2, -1) if not Path(f"/proc/{pid}").exists())
    left = tmp_path / f".work.{dead}-{'0' * 16}.tmp"
    left.mkdir()
    with hidden_folder(tmp_path / "work") as folder:
        (folder / "x").touch()
        assert not left.exists() and folder.parent == tmp_path
    assert not list(tmp_path.iterdir())
