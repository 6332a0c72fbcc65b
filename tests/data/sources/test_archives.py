"""Archives as people make them, and archives that would never end."""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from mslora_cr.cli.main import main
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.sources import raw as module
from mslora_cr.data.sources.annotations import build_annotations
from mslora_cr.data.sources.catalog import data_set
from mslora_cr.data.sources.prepare import prepare
from mslora_cr.data.sources.raw import RawData, read
from tests.data.test_images import picture


def listed(*places: Path, work: Path) -> list[str]:
    with RawData(places, work) as raw:
        return sorted(str(file.path) for file in raw.files)


def zipped(path: Path, *names: str, content: bytes = b"x", **options: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # as zipfile itself would not write it
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in options.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


def test_a_zip_made_on_windows(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "images\\train\\a.png", "images\\", create_system=0)
    with RawData([path], tmp_path / "work") as raw:
        [file] = raw.files
        assert file.path == PurePosixPath("a/images/train/a.png") and read(file) == b"x"


def test_backslashes_do_not_lead_out(tmp_path: Path) -> None:
    for name in ("..\\evil.png", "C:\\evil.png", "\\evil.png"):
        with pytest.raises(DataError, match="would be extracted outside"):
            listed(zipped(tmp_path / "a.zip", name), work=tmp_path / "work")


def test_utf_8_without_its_flag_and_other_encodings(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "@@@.png")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"@@@", "é1".encode()))
    assert listed(path, work=tmp_path / "work") == ["a/é1.png"]
    path.write_bytes(data.replace(b"@@@", "胃".encode("gbk") + b"1"))
    assert len(listed(path, work=tmp_path / "work")) == 1


def test_what_macos_adds_is_left_out(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "a/x.png", "__MACOSX/a/._x.png", "a/._x.png", "a/.DS_Store")
    assert listed(path, work=tmp_path / "work") == ["a/a/x.png"]
    (tmp_path / "raw" / "__MACOSX").mkdir(parents=True)
    (tmp_path / "raw" / "__MACOSX" / "x.png").write_bytes(b"x")
    assert listed(tmp_path / "raw", work=tmp_path / "work") == []


def test_endings_and_case_are_found_and_the_annotations_name_is_kept(tmp_path: Path) -> None:
    root, folder = tmp_path / "root", tmp_path / "root" / "HAM10000"
    dataset = data_set("HAM")
    folder = root / dataset.folder
    folder.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "nv"}]
    (folder / "train.json").write_text(json.dumps([{"id": 0, "image": "images/ISIC_1.jpg", "conversations": turns}]))
    row = {"question_id": 0, "image": "images/ISIC_2.jpg", "text": "?", "gt": "nv", "answer_type": "CLOSED"}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "raw").mkdir()
    picture(tmp_path / "raw" / "ISIC_1.JPEG.png").rename(tmp_path / "raw" / "ISIC_1.JPEG")
    picture(tmp_path / "raw" / "isic_2.png").rename(tmp_path / "raw" / "isic_2.JPG")
    result = prepare(dataset, [tmp_path / "raw"], root, progress=False)
    assert (result.placed, result.missing) == (2, [])
    assert (folder / "images" / "ISIC_1.jpg").is_file()


def test_ids_that_have_their_ending_already(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = "".join(f"L{number},ISIC_{number}.jpg,nv\n" for number in range(12))
    (tmp_path / "raw" / "HAM10000_metadata.csv").write_bytes(b"\xef\xbb\xbflesion_id,image_id,dx\n" + rows.encode())
    with RawData([tmp_path / "raw"], tmp_path / "work") as raw:
        build_annotations(data_set("HAM"), raw, tmp_path / "out")
    assert ".jpg.jpg" not in (tmp_path / "out" / "train.json").read_text()


def test_null_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "raw" / "qas" / split
        folder.mkdir(parents=True)
        rows = [{"image": "a", "question": "q", "answer": answer} for answer in ("yes", None, "no")]
        (folder / f"{split}_qa.json").write_text(json.dumps([*rows, {"image": "a", "question": None, "answer": "x"}]))
    with RawData([tmp_path / "raw"], tmp_path / "work") as raw:
        counts = build_annotations(data_set("pathvqa"), raw, tmp_path / "out")
    assert counts == {"train": 2, "test": 2, "empty": 4}


# --- without end -----------------------------------------------------------------------------------------------------


def nested(path: Path, levels: int) -> Path:
    content, name = b"x", "x.png"
    for level in range(levels):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, content)
        content, name = buffer.getvalue(), f"{level}.zip"
    path.write_bytes(content)
    return path


def test_archives_in_archives_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    assert len(listed(nested(tmp_path / "a.zip", 5), work=work)) == 1
    with pytest.raises(DataError, match="down to 4 levels"):
        listed(nested(tmp_path / "a.zip", 6), work=work)
    inner = nested(tmp_path / "b.zip", 1).read_bytes()
    zipped(tmp_path / "many.zip", *(f"{number}.zip" for number in range(9)), content=inner)
    assert len(listed(tmp_path / "many.zip", work=work)) == 9
    for limit, value in (("MOST_NESTED", 8), ("MOST_NESTED_BYTES", 8 * len(inner))):
        with monkeypatch.context() as patched:
            patched.setattr(module, limit, value)
            with pytest.raises(DataError, match="archives inside archives are unpacked"):
                listed(tmp_path / "many.zip", work=work)
    assert not work.exists()


def deflated(path: Path) -> Path:
    return zipped(path, "0.png", "1.png", content=bytes(3 << 20))


def sparse(path: Path) -> Path:
    """A tar archive of a few hundred bytes with one member of a terabyte, all of it a hole."""
    info = tarfile.TarInfo("huge.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    info.pax_headers["GNU.sparse.name"] = "huge.png"
    info.size = 512
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"1\n1099511627775\n1\n".ljust(512, b"\0")))
    return path


@pytest.mark.parametrize("make", [deflated, sparse])
def test_members_that_expand_without_bounds_are_refused(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPANSION_SLACK", 1 << 20)
    path = make(tmp_path / ("a.zip" if make is deflated else "a.tar"))
    with pytest.raises(DataError, match="refused: its members unpack to more than 200 times its own size"):
        listed(path, work=tmp_path / "work")


def test_headers_that_make_no_sense(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.tar")
    for before, after in ((b"1099511627776", b"109951162777x"), (b"GNU.sparse.major=1", b"GNU.sparse.major=x")):
        (tmp_path / "b.tar").write_bytes(path.read_bytes().replace(before, after))
        with pytest.raises(DataError, match=r"b\.tar: "):
            listed(tmp_path / "b.tar", work=tmp_path / "work")


def test_fifos_are_passed_over_or_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("a.zip", "b.png"):
        os.mkfifo(tmp_path / "raw" / name)
    assert listed(tmp_path / "raw", work=tmp_path / "work") == []
    with pytest.raises(DataError, match="neither a file nor a folder"):
        listed(tmp_path / "raw" / "a.zip", work=tmp_path / "work")


def test_rows_of_images_that_cannot_be_had_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, root = tmp_path / "raw", tmp_path / "root"
    (raw / "images").mkdir(parents=True)
    names = [hashlib.md5(str(number).encode()).hexdigest() for number in range(20)]
    table = "".join(f"{name},psoriasis,non-neoplastic\n" for name in names)
    (raw / "fitzpatrick17k.csv").write_text("md5hash,label,three_partition_label\n" + table)
    for name in names[2:]:
        picture(raw / "images" / f"{name}.png").rename(raw / "images" / f"{name}.jpg")
    (raw / "images" / f"{names[2]}.jpg").write_text("<html>not found</html>")
    command = ["data", "prepare", "derm", "--raw", str(raw), "--root", str(root)]
    assert main([*command, "--skip-missing"]) == 1
    assert "give both" in capsys.readouterr().err
    assert main([*command, "--annotations", "--skip-missing"]) == 0
    said = capsys.readouterr().out
    assert "left out: 3 images that are missing, ambiguous or unreadable, 6 rows" in said and names[2] in said
    folder = root / data_set("derm").folder
    assert not (folder / "images" / f"{names[2]}.jpg").exists()
    rows = len(TrainingRecords(folder / "train.json")) + len(TestRecords(folder / "test.jsonl"))
    assert rows == 2 * 17
    assert main([*command, "--annotations", "--skip-missing"]) == 0  # and again, the same
    assert main(["data", "check", str(root), "--only", "derm", "--output", str(tmp_path / "check.json")]) == 0
    assert "scores cannot be compared with the published ones" in capsys.readouterr().out
