"""Every data set is prepared from a miniature of its raw release, in the layout the catalogue states."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mslora_cr.data.images import image_roots, load_image, resolve_image
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.sources import prepare as module
from mslora_cr.data.sources.catalog import catalog, data_set
from mslora_cr.data.sources.prepare import Prepared, prepare
from mslora_cr.data.sources.raw import RawData


def png(colour: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def annotate(folder: Path, train: list[str], test: list[str], answer: str = "yes") -> None:
    turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": answer}]
    put(
        folder / "train.json",
        json.dumps([{"id": i, "image": x, "conversations": turns} for i, x in enumerate(train)]),
    )
    rows = [
        {"question_id": i, "image": x, "text": "Is it?", "gt": answer, "answer_type": "CLOSED"}
        for i, x in enumerate(test)
    ]
    put(folder / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def red(root: Path, dataset: str, name: str) -> int:
    """The red value of a placed image: which raw file it came from."""
    entry = data_set(dataset)
    return load_image(resolve_image(name, image_roots(root, entry.folder))).getpixel((0, 0))[0]


def run(dataset: str, raw: Path | list[Path], root: Path, **options) -> Prepared:
    return prepare(data_set(dataset), raw if isinstance(raw, list) else [raw], root, progress=False, **options)


def everything(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# --- matching and placing ----------------------------------------------------


def test_images_are_matched_by_their_longest_suffix_and_linked(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    for i, name in enumerate(["a/train/x.png", "a/test/x.png", "b/y.png"]):
        put(raw / "pvqa" / "images" / name, png(i))
    annotate(root / "PathVQA", ["images/train/x.png"], ["images/test/x.png", "images/b/y.png", "images/b/z.png"])
    result = run("pathvqa", raw, root)
    assert (result.placed, result.present, result.missing) == (3, 0, ["images/b/z.png"])
    assert [red(root, "pathvqa", f"images/{name}.png") for name in ("train/x", "test/x", "b/y")] == [0, 1, 2]
    assert (root / "PathVQA/images/b/y.png").readlink() == raw / "pvqa/images/b/y.png"

    before = everything(root)
    again = run("pathvqa", raw, root)
    assert (again.placed, again.present, again.missing) == (0, 3, ["images/b/z.png"])
    assert everything(root) == before


def test_names_in_another_unicode_form_are_matched(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    names = [f"images/{folder}/é.png" for folder in ("œdème", "aplasía")]
    for i, name in enumerate(names):
        put(raw / unicodedata.normalize("NFD", name), png(i))
    annotate(root / "PathVQA", names[:1], names[1:])
    assert run("pathvqa", raw, root).placed == 2
    assert [red(root, "pathvqa", name) for name in names] == [0, 1]
    shutil.rmtree(root / "PathVQA" / "images")
    shutil.copytree(raw / "images", root / "PathVQA" / "images")  # as a Mac unpacks them
    again = run("pathvqa", raw, root)
    assert (again.placed, again.present, again.missing) == (0, 2, [])


def test_links_in_the_raw_data_are_followed_once(tmp_path):
    put(tmp_path / "elsewhere" / "x.png", png(1))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "raw")
    annotate(tmp_path / "root" / "PathVQA", ["images/x.png"], ["images/x.png"])
    with RawData([tmp_path / "raw"], tmp_path / "work") as data:
        assert [str(file.path) for file in data.files] == ["linked/x.png"]
    assert run("pathvqa", tmp_path / "raw", tmp_path / "root").placed == 1


def test_copies_are_files_of_their_own(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    put(raw / "x.png", png(9))
    annotate(root / "PathVQA", ["images/x.png"], ["images/x.png"])
    assert run("pathvqa", raw, root, copy=True).placed == 1
    assert not (root / "PathVQA/images/x.png").is_symlink()
    assert red(root, "pathvqa", "images/x.png") == 9


def test_names_may_start_with_the_folder_of_the_data_set(tmp_path):
    put(tmp_path / "raw" / "x.png", png(1))
    annotate(tmp_path / "root" / "PathVQA", ["PathVQA/images/x.png"], ["PathVQA/images/x.png"])
    run("pathvqa", tmp_path / "raw", tmp_path / "root")
    assert (tmp_path / "root/PathVQA/images/x.png").exists()


def test_equal_names_are_told_apart_by_their_folders_or_reported(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    put(raw / "imgs/xmlab1/source.jpg", png(1))
    put(raw / "imgs/xmlab2/source.jpg", png(2))
    names = [f"Slake_images/xmlab{i}/source.jpg" for i in (1, 2, 3)]
    annotate(root / "Slake-VQARad", names[:2], names[2:])
    result = run("slake-vqarad", raw, root)
    assert result.missing == names[2:] and result.placed == 2
    assert [red(root, "slake-vqarad", name) for name in names[:2]] == [1, 2]


def test_a_test_image_never_gets_the_training_image_of_the_same_name(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    put(raw / "chest_xray/train/NORMAL/p1.jpeg", png(1))
    annotate(root / "CXP", ["train/NORMAL/p1.jpeg"], ["test/NORMAL/p1.jpeg"])
    for _ in range(2):  # also when the training image is in place already
        assert run("CXP", raw, root).missing == ["test/NORMAL/p1.jpeg"]
    put(raw / "chest_xray/test/NORMAL/p1.jpeg", png(2))
    assert run("CXP", raw, root).missing == []
    assert red(root, "CXP", "test/NORMAL/p1.jpeg") == 2


def test_flattened_names_prefer_the_raw_folder_of_the_same_split(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    put(raw / "chest_xray/train/NORMAL/p1.jpeg", png(1))
    put(raw / "chest_xray/test/NORMAL/p1.jpeg", png(2))
    annotate(root / "CXP", ["train/p1.jpeg"], ["test/p1.jpeg"])
    assert run("CXP", raw, root).placed == 2
    assert [red(root, "CXP", f"{split}/p1.jpeg") for split in ("train", "test")] == [1, 2]


def test_ambiguous_images_are_reported_unless_equal(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    for folder, one, two in (("a", 1, 5), ("b", 2, 5)):
        put(raw / folder / "one.png", png(one))
        put(raw / folder / "two.png", png(two))
    annotate(root / "PathVQA", ["images/one.png"], ["images/two.png"])
    result = run("pathvqa", raw, root)
    assert result.ambiguous == {"images/one.png": ["a/one.png", "b/one.png"]}
    assert result.placed == 1 and result.missing == []
    put(root / "PathVQA/images/one.png", png(1))  # by hand
    result = run("pathvqa", raw, root)
    assert (result.placed, result.present, result.missing, result.ambiguous) == (0, 2, [], {})


def test_archives_and_archives_in_archives_are_unpacked(tmp_path):
    inner = zip_of(tmp_path / "inner.zip", {"part/y.png": png(2), "__MACOSX/part/._y.png": b"clutter"}).read_bytes()
    raw = [
        zip_of(tmp_path / "a.zip", {"pvqa/images/x.png": png(1), "HAM_part_1.zip": inner}),
        tar_of(tmp_path / "b.tgz", {"./images/z.png": png(3)}),
    ]
    root = tmp_path / "root"
    annotate(root / "PathVQA", ["images/x.png", "images/y.png"], ["images/z.png"])
    result = run("pathvqa", raw, root)
    assert (result.placed, result.missing) == (3, [])
    assert [red(root, "pathvqa", f"images/{name}.png") for name in "xyz"] == [1, 2, 3]
    assert sorted(path.name for path in (root / "PathVQA").iterdir()) == [
        "images",
        "test.jsonl",
        "train.json",
    ]


def test_many_images_of_one_name_are_matched_in_time(tmp_path):
    """As many `source.jpg` as would take minutes if each were compared with each."""
    names = [f"Slake_images/xmlab{i}/source.jpg" for i in range(20_000)]
    annotate(tmp_path / "root/Slake-VQARad", names, names[:1])
    zip_of(tmp_path / "raw.zip", {name.replace("Slake_images", "imgs"): b"" for name in names})
    with RawData([tmp_path / "raw.zip"], tmp_path / "work") as data:
        result = Prepared()
        matches = module._match(data_set("slake-vqarad"), names, data, result)
    assert result.ambiguous == {} and len(matches) == len(names)
    assert all(file.path.parts[-2] == name.split("/")[1] for name, file in matches.items())


@pytest.mark.parametrize("suffix", ["bz2", "xz"])
def test_other_tar_archives_are_read(suffix, tmp_path):
    with tarfile.open(tmp_path / f"raw.tar.{suffix}", f"w:{suffix}") as archive:
        info = tarfile.TarInfo("images/x.png")
        info.size = len(png(4))
        archive.addfile(info, io.BytesIO(png(4)))
    annotate(tmp_path / "root/PathVQA", ["images/x.png"], ["images/x.png"])
    run("pathvqa", tmp_path / f"raw.tar.{suffix}", tmp_path / "root")
    assert red(tmp_path / "root", "pathvqa", "images/x.png") == 4
    with pytest.raises(DataError, match=r"raw\.7z: archives of this kind cannot be read; unpack it"):
        run("pathvqa", put(tmp_path / "raw.7z", b"7z"), tmp_path / "root")


def test_broken_links_are_replaced(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    put(raw / "x.png", png(1))
    annotate(root / "PathVQA", ["images/x.png"], ["images/x.png"])
    (root / "PathVQA/images").mkdir()
    (root / "PathVQA/images/x.png").symlink_to(tmp_path / "gone.png")
    assert run("pathvqa", raw, root).placed == 1
    assert red(root, "pathvqa", "images/x.png") == 1


def test_without_annotations_the_user_is_told_where_they_come_from(tmp_path):
    with pytest.raises(DataError, match=r"data download.*--annotations"):
        run("pathvqa", tmp_path, tmp_path / "root")
    with pytest.raises(DataError, match=r"data download.*hub only"):
        run("nmi", tmp_path, tmp_path / "root")
    with pytest.raises(DataError, match="nothing to build annotations from"):
        run("nmi", tmp_path, tmp_path / "root", annotations=True)
    with pytest.raises(DataError, match="no such file or folder"):
        run("pathvqa", tmp_path / "nowhere", tmp_path / "root")


# --- refusals ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../evil.png", "/tmp/evil.png", "images/..\\evil.png"])
def test_annotations_that_lead_outside_are_refused(name, tmp_path):
    root = tmp_path / "data" / "root"
    put(tmp_path / "raw" / "evil.png", png(1))
    annotate(root / "PathVQA", ["images/evil.png"], [name])
    before = everything(tmp_path)
    with pytest.raises(DataError, match=r"test.jsonl: question 0.*no '\.\.'"):
        run("pathvqa", tmp_path / "raw", root)
    assert everything(tmp_path) == before


def escaping_tar(path: Path, **attributes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("images/x.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
        bad = tarfile.TarInfo(attributes.pop("name", "images/y.png"))
        for key, value in attributes.items():
            setattr(bad, key, value)
        archive.addfile(bad)
    return path


def linking_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("images/x.png")
        info.external_attr = 0o120777 << 16  # a symbolic link
        archive.writestr(info, "/etc/passwd")
    return path


ESCAPES = {
    "zip symlink": lambda path: linking_zip(path / "a.zip"),
    "zip slip": lambda path: zip_of(path / "a.zip", {"images/x.png": png(1), "../../evil.png": png(2)}),
    "zip absolute": lambda path: zip_of(path / "a.zip", {f"{path}/evil.png": png(2)}),
    "zip backslash": lambda path: zip_of(path / "a.zip", {"..\\evil.png": png(2)}),
    "nested": lambda path: zip_of(
        path / "a.zip", {"in.zip": zip_of(path / "in.zip", {"../evil.png": png(2)}).read_bytes()}
    ),
    "tar slip": lambda path: escaping_tar(path / "a.tgz", name="../../evil.png"),
    "tar absolute": lambda path: escaping_tar(path / "a.tgz", name=f"{path}/evil.png"),
    "tar symlink": lambda path: escaping_tar(path / "a.tgz", type=tarfile.SYMTYPE, linkname="/etc"),
    "tar hard link": lambda path: escaping_tar(path / "a.tgz", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "tar device": lambda path: escaping_tar(path / "a.tgz", type=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_archives_that_would_escape_are_refused_before_anything_is_written(kind, tmp_path):
    (tmp_path / "raw").mkdir()
    archive = ESCAPES[kind](tmp_path / "raw")
    root = tmp_path / "data" / "root"
    annotate(root / "PathVQA", ["images/x.png"], ["images/y.png"])
    before = everything(tmp_path)
    with pytest.raises(DataError, match="refused: member"):
        run("pathvqa", archive, root)
    assert everything(tmp_path) == before


def test_nothing_is_written_through_a_link_out_of_the_data_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    put(tmp_path / "raw" / "x.png", png(1))
    annotate(root / "PathVQA", ["images/x.png"], ["images/x.png"])
    (root / "PathVQA/images").symlink_to(outside)
    with pytest.raises(DataError, match="outside the data root"):
        run("pathvqa", tmp_path / "raw", root)
    assert list(outside.iterdir()) == []
    # What the user linked and filled is simply there.
    put(outside / "x.png", png(1))
    assert run("pathvqa", tmp_path / "raw", root).present == 1


def test_damaged_and_oversized_archives_are_refused(tmp_path, monkeypatch):
    root = tmp_path / "root"
    annotate(root / "PathVQA", ["images/x.png"], ["images/x.png"])
    good = zip_of(tmp_path / "a.zip", {"images/x.png": png(1) * 10})
    for name, content in {"cut.zip": good.read_bytes()[:-30], "cut.tgz": b"\x1f\x8b" + b"x" * 50}.items():
        with pytest.raises(DataError, match="damaged or unreadable"):
            run("pathvqa", put(tmp_path / name, content), root)
    numbers = b"".join(b"%d " % number for number in range(20_000))
    with tarfile.open(tmp_path / "wrong.tar.xz", "w:xz") as archive:
        info = tarfile.TarInfo("images/x.png")
        info.size = len(numbers)
        archive.addfile(info, io.BytesIO(numbers))
    wrong = bytearray((tmp_path / "wrong.tar.xz").read_bytes())
    wrong[len(wrong) // 2] ^= 255
    with pytest.raises(DataError, match="damaged or unreadable"):
        run("pathvqa", put(tmp_path / "wrong.tar.xz", bytes(wrong)), root)
    wrong = bytearray(good.read_bytes())
    wrong[60] ^= 255  # the content no longer has the checksum
    with pytest.raises(DataError, match="damaged or unreadable"):
        run("pathvqa", put(tmp_path / "wrong.zip", bytes(wrong)), root)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 80, 20))
        with pytest.raises(DataError, match="20 are free"):
            run("pathvqa", good, root)
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 20)
    with pytest.raises(DataError, match="too large for an image"):
        run("pathvqa", good, root)
    assert not (root / "PathVQA/images/x.png").exists()


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_pickles_of_more_than_plain_data_are_refused(tmp_path):
    trace = tmp_path / "was-run"
    for payload in (Evil(trace), [{"image": "a", "question": np.float64(1), "answer": "b"}]):
        put(tmp_path / "raw/pvqa/qas/train/train_qa.pkl", pickle.dumps(payload))
        with pytest.raises(DataError, match=r"train_qa.pkl: refused: this pickle wants to load"):
            run("pathvqa", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert not trace.exists()
    assert everything(tmp_path / "root") == {}


# --- annotations from raw releases -------------------------------------------


def read_back(root: Path, dataset: str) -> tuple[list, list]:
    folder = root / data_set(dataset).folder
    train = [(r.id, r.images[0], r.turns[0].text, r.turns[1].text) for r in TrainingRecords(folder / "train.json")]
    test = [(r.question_id, r.images[0], r.text, r.gt, r.answer_type) for r in TestRecords(folder / "test.jsonl")]
    return train, test


QAS = {
    "train": [{"image": "train_0001", "question": "What is it?", "answer": "a cell"}],
    "test": [
        {"image": "test_0001", "question": "Is it a cell?", "answer": "Yes"},
        {"image": "test_0001", "question": "How many?", "answer": 2},
        {"image": "test_0001", "question": "And?", "answer": ""},
    ],
}


@pytest.mark.parametrize("suffix", ["pkl", "json", "jsonl"])
def test_pathvqa(suffix, tmp_path):
    dump = {
        "pkl": pickle.dumps,
        "json": json.dumps,
        "jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows),
    }[suffix]
    for split, rows in QAS.items():
        put(tmp_path / f"raw/pvqa/qas/{split}/{split}_qa.{suffix}", dump(rows))
        put(tmp_path / f"raw/pvqa/images/{split}/{split}_0001.jpg", png(1))
    result = run("pathvqa", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert result.rows == {"train": 1, "test": 2, "empty": 1} and result.placed == 2 and not result.missing
    train, test = read_back(tmp_path / "root", "pathvqa")
    assert train == [(0, "images/train/train_0001.jpg", "<image>\nWhat is it?", "a cell")]
    assert test == [
        (0, "images/test/test_0001.jpg", "Is it a cell?", "Yes", "CLOSED"),
        (1, "images/test/test_0001.jpg", "How many?", "2", "OPEN"),
    ]


def validation_of(root: Path, dataset: str) -> list[tuple[str, str, str]]:
    return [(r.images[0], r.gt, r.answer_type) for r in TestRecords(root / data_set(dataset).folder / "val.jsonl")]


def test_pathvqa_keeps_its_validation_split(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    rows = {**QAS, "val": [{"image": "val_0001", "question": "Is it?", "answer": "no"}]}
    for split, content in QAS.items():
        put(raw / f"qas/{split}/{split}_qa.json", json.dumps(content))
    run("pathvqa", raw, root, annotations=True)
    before = everything(root)
    assert not (root / "PathVQA/val.jsonl").exists()
    for split, content in rows.items():
        put(raw / f"qas/{split}/{split}_qa.json", json.dumps(content))
        put(raw / f"images/{split}/{split}_0001.jpg", png(1))
    result = run("pathvqa", raw, root, annotations=True)
    assert result.rows == {"train": 1, "test": 2, "validation": 1, "empty": 1}
    assert result.placed == 3 and not result.missing
    assert validation_of(root, "pathvqa") == [("images/val/val_0001.jpg", "no", "CLOSED")]
    assert before.items() <= everything(root).items()  # training and test records are what they were
    put(root / "PathVQA/val.jsonl", "{}")
    with pytest.raises(DataError, match=r"val.jsonl: differs from what would be built"):
        run("pathvqa", raw, root, annotations=True)


def test_lines_end_at_newlines_only_and_blank_ones_are_skipped(tmp_path):
    """Other characters that some take for line breaks may stand in a text."""
    question = "What\u2028is\u0085it?"
    row = json.dumps({"image": "a", "question": question, "answer": "b"}, ensure_ascii=False)
    for split in QAS:
        put(tmp_path / f"raw/qas/{split}/{split}_qa.jsonl", f"\n{row}\r\n  \n{row}\n\n".encode("utf-8-sig"))
    result = run("pathvqa", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert result.rows == {"train": 2, "test": 2}
    assert read_back(tmp_path / "root", "pathvqa")[1][1][2] == question


def test_a_byte_order_mark_is_no_part_of_a_list(tmp_path):
    for split, rows in QAS.items():
        put(tmp_path / f"raw/qas/{split}/{split}_qa.json", json.dumps(rows).encode("utf-8-sig"))
    assert run("pathvqa", tmp_path / "raw", tmp_path / "root", annotations=True).rows["train"] == 1


def test_slake_and_vqarad_are_two_downloads(tmp_path):
    def slake(number: int, lang: str = "en") -> dict:
        return {
            "qid": number,
            "img_name": f"xmlab{number}/source.jpg",
            "question": f"Q{number}?",
            "answer": "CT",
            "q_lang": lang,
            "answer_type": "OPEN",
            "triple": ["vhead", "_", "_"],
        }

    def rad(name: str, phrase: str) -> dict:
        return {
            "qid": 1,
            "image_name": name,
            "question": "Is it?",
            "answer": "Yes",
            "answer_type": "CLOSED ",
            "phrase_type": phrase,
        }

    files = {
        "Slake1.0/train.json": json.dumps([slake(0), slake(1, "zh")]).encode(),
        "Slake1.0/test.json": json.dumps([slake(2, "zh"), slake(3)]).encode(),
        "Slake1.0/validate.json": json.dumps([slake(4)]).encode(),
        **{f"Slake1.0/imgs/xmlab{i}/source.jpg": png(i) for i in range(5)},
    }
    first = zip_of(tmp_path / "Slake1.0.zip", files)
    second = tmp_path / "osfstorage"
    rows = [
        rad("synpic1.jpg", "freeform"),
        rad("synpic2.jpg", "test_para"),
        rad("synpic1.jpg", "test_freeform"),
    ]
    put(second / "VQA_RAD Dataset Public.json", json.dumps(rows))
    for i in (1, 2):
        put(second / f"VQA_RAD Image Folder/synpic{i}.jpg", png(10 + i))
    root = tmp_path / "root"
    result = run("slake-vqarad", [first, second], root, annotations=True)
    assert result.rows == {"train": 2, "test": 3, "validation": 1} and not result.missing
    assert validation_of(root, "slake-vqarad") == [("Slake_images/xmlab4/source.jpg", "CT", "OPEN")]
    train, test = read_back(root, "slake-vqarad")
    assert [(row[0], row[1]) for row in train] == [
        (1, "Slake_images/xmlab0/source.jpg"),
        (1, "VqaRad_images/synpic1.jpg"),
    ]
    assert [(row[0], row[1], row[4]) for row in test] == [
        (1, "Slake_images/xmlab3/source.jpg", "OPEN"),
        (1, "VqaRad_images/synpic2.jpg", "CLOSED"),
        (2, "VqaRad_images/synpic1.jpg", "CLOSED"),
    ]
    assert red(root, "slake-vqarad", "Slake_images/xmlab3/source.jpg") == 3
    with pytest.raises(DataError, match=r"VQA_RAD Dataset Public.json: not found"):
        run("slake-vqarad", first, tmp_path / "other", annotations=True)


def test_fitzpatrick_asks_two_questions_and_splits_by_image(tmp_path):
    lines = [",md5hash,fitzpatrick_scale,label,nine_partition_label,three_partition_label,url"]
    names = [f"{i:032x}" for i in range(60)]
    lines += [f'{i},{name},3,"psoriasis, plaque",inflammatory,non-neoplastic,http://x' for i, name in enumerate(names)]
    put(tmp_path / "raw/fitzpatrick17k.csv", "\n".join(lines))
    for name in names:
        put(tmp_path / f"raw/images/{name}.jpg", png(3))
    result = run("derm", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert result.placed == 60 and result.rows["train"] + result.rows["test"] == 120
    assert 8 <= result.rows["test"] <= 44
    train, test = read_back(tmp_path / "root", "derm")
    assert not {row[1] for row in train} & {row[1] for row in test}
    assert {(row[3], row[4]) for row in test} == {("psoriasis, plaque", "OPEN"), ("non-neoplastic", "CLOSED")}


@pytest.mark.parametrize("file, separator", [("HAM10000_metadata.tab", "\t"), ("HAM10000_metadata", ",")])
def test_ham_keeps_the_images_of_a_lesion_together(file, separator, tmp_path):
    rows = [["lesion_id", "image_id", "dx", "age"]]
    rows += [[f"HAM_{i // 2:07}", f"ISIC_{i:07}", "nv" if i % 3 else "mel", "80"] for i in range(80)]
    put(tmp_path / f"raw/{file}", "\n".join(separator.join(row) for row in rows))
    for part, start in (("1", 0), ("2", 40)):
        zip_of(
            tmp_path / f"raw/HAM10000_images_part_{part}.zip",
            {f"ISIC_{i:07}.jpg": png(i) for i in range(start, start + 40)},
        )
    result = run("HAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert result.placed == 80
    train, test = read_back(tmp_path / "root", "HAM")
    lesions = [{int(row[0][5:]) // 2 for row in rows} for rows in (train, test)]
    assert not lesions[0] & lesions[1] and len(lesions[0] | lesions[1]) == 40
    assert {row[3] for row in test} <= {"nv", "mel"}
    records = list(TestRecords(tmp_path / "root" / "HAM" / "test.jsonl"))
    assert {record.patient for record in records} == {f"HAM_{number:07}" for number in lesions[1]}
    assert {tuple(record.attributes.items()) for record in records} == {(("age", 80),)}
    assert red(tmp_path / "root", "HAM", "images/ISIC_0000041.jpg") == 41


def test_cxp_reads_kaggles_doubled_archive_once(tmp_path):
    tree = {
        f"{split}/{label}/p{i}.jpeg": png(10 * j + i)
        for j, (split, label) in enumerate((s, x) for s in ("train", "test", "val") for x in ("NORMAL", "PNEUMONIA"))
        for i in (1, 2)
    }
    doubled = {f"chest_xray/{outer}{name}": data for name, data in tree.items() for outer in ("", "chest_xray/")}
    archive = zip_of(tmp_path / "archive.zip", doubled | {"chest_xray/__MACOSX/._train": b""})
    result = run("CXP", archive, tmp_path / "root", annotations=True, questions={"label": "Ill?"})
    assert (result.rows, result.placed, result.ambiguous) == ({"train": 4, "test": 4}, 8, {})
    _, test = read_back(tmp_path / "root", "CXP")
    assert test[0] == (0, "test/NORMAL/p1.jpeg", "Ill?", "normal", "CLOSED")
    assert test[3] == (3, "test/PNEUMONIA/p2.jpeg", "Ill?", "pneumonia", "CLOSED")
    assert red(tmp_path / "root", "CXP", "test/PNEUMONIA/p2.jpeg") == 32


def pcam(
    folder: Path, rows: int = 600, packed: bool = False, splits: tuple[str, ...] = ("train", "test")
) -> dict[str, np.ndarray]:
    h5py = pytest.importorskip("h5py")
    folder.mkdir(parents=True)
    labels = {}
    for seed, split in enumerate(splits):
        random = np.random.default_rng(seed)
        patches = random.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
        labels[split] = random.integers(0, 2, (rows, 1, 1, 1), dtype=np.uint8)
        for which, array in (("x", patches), ("y", labels[split])):
            path = folder / f"camelyonpatch_level_2_split_{split}_{which}.h5"
            with h5py.File(path, "w") as file:
                file[which] = array
            if packed:
                put(path.with_name(f"{path.name}.gz"), gzip.compress(path.read_bytes(), 1))
                path.unlink()
    return labels


@pytest.mark.parametrize("packed", [False, True])
def test_pcam_arrays_become_images_and_labels(packed, tmp_path):
    h5py = pytest.importorskip("h5py")
    labels = pcam(tmp_path / "raw", packed=packed)
    result = run("PCAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert (result.rows, result.placed) == ({"train": 600, "test": 600}, 1200)
    train, test = read_back(tmp_path / "root", "PCAM")
    assert [row[3] == "Positive" for row in test] == list(labels["test"].ravel() == 1)
    if not packed:
        with h5py.File(tmp_path / "raw/camelyonpatch_level_2_split_train_x.h5") as file:
            for index in (0, 255, 256, 599):
                image = load_image(tmp_path / "root/PCam" / train[index][1])
                assert np.array_equal(np.asarray(image), file["x"][index])
    (tmp_path / "root/PCam/test/000007.png").unlink()
    again = run("PCAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    assert (again.placed, again.present) == (1, 1199)
    assert not list((tmp_path / "root/PCam").glob(".*"))


def reword(folder: Path, positive: str, negative: str) -> None:
    for name in ("train.json", "test.jsonl"):
        text = (folder / name).read_text().replace('"Positive"', json.dumps(positive))
        (folder / name).write_text(text.replace('"Negative"', json.dumps(negative)))


def test_pcam_keeps_its_validation_split(tmp_path):
    labels = pcam(tmp_path / "raw", rows=20, splits=("train", "test", "valid"))
    table = tmp_path / "raw" / "camelyonpatch_level_2_split_test_meta.csv"
    table.write_text("coord_x,wsi\n" + "".join(f"{row},camelyon16_test_{row // 5:03d}\n" for row in range(19)))
    with pytest.raises(DataError, match="expected 20 rows with the column wsi, found 19"):
        run("PCAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    table.write_text(table.read_text() + "19,camelyon16_test_003\n")
    result = run("PCAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    lines = (tmp_path / "root/PCam/test.jsonl").read_text().splitlines()
    assert [json.loads(line)["patient"][-3:] for line in lines[::5]] == ["000", "001", "002", "003"]
    assert (result.rows, result.placed) == ({"train": 20, "test": 20, "validation": 20}, 60)
    rows = validation_of(tmp_path / "root", "PCAM")
    assert [answer == "Positive" for _, answer, _ in rows] == list(labels["valid"].ravel() == 1)
    assert rows[7][0] == "valid/000007.png" and (tmp_path / "root/PCam/valid/000007.png").is_file()


@pytest.mark.parametrize("words", [("yes", "no"), ("Tumor.", "Normal."), ("abnormal ", "\nnormal"), ("no", "yes")])
def test_pcam_answers_may_be_any_two_words(words, tmp_path):
    """Which of them means tumor is the question's affair."""
    pcam(tmp_path / "raw", rows=40)
    run("PCAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    before = everything(tmp_path / "root")
    folder = tmp_path / "root/PCam"
    for split in ("train", "test"):
        shutil.rmtree(folder / split)
    reword(folder, *words)
    assert run("PCAM", tmp_path / "raw", tmp_path / "root").placed == 80
    images = {name: content for name, content in before.items() if name.endswith(".png")}
    assert images.items() <= everything(tmp_path / "root").items()


@pytest.mark.parametrize("wrong", ["normal", "maybe"])
def test_pcam_answers_that_do_not_go_with_the_labels_are_counted(wrong, tmp_path):
    labels = pcam(tmp_path / "raw", rows=40)
    run("PCAM", tmp_path / "raw", tmp_path / "root", annotations=True)
    folder = tmp_path / "root/PCam"
    for split in ("train", "test"):
        shutil.rmtree(folder / split)
    reword(folder, "tumor", "normal")
    path = folder / "train.json"
    path.write_text(path.read_text().replace('"value": "tumor"', f'"value": "{wrong}"', 1))
    tumor = sum(int(each.sum()) for each in labels.values())
    counts = {"tumor": [tumor - 1, 0], "normal": [0, 80 - tumor], "maybe": [0, 0]}
    counts[wrong][0] += 1
    with pytest.raises(DataError) as caught:
        run("PCAM", tmp_path / "raw", tmp_path / "root")
    for word, (with_tumor, without) in counts.items():
        assert (f"{word!r} ({with_tumor} with, {without} without)" in str(caught.value)) == (with_tumor + without > 0)
    assert not list(folder.rglob("*.png"))


def test_pcam_names_that_do_not_count_the_rows_are_refused(tmp_path):
    pcam(tmp_path / "raw", rows=4)
    folder = tmp_path / "root/PCam"
    annotate(folder, ["train/x_3.png"], ["test/2.png"], answer="Positive")
    with pytest.raises(DataError, match="expected two answers"):
        run("PCAM", tmp_path / "raw", tmp_path / "root")
    annotate(folder, ["train/abc.png"], ["test/abc.png"])
    with pytest.raises(DataError, match="row number"):
        run("PCAM", tmp_path / "raw", tmp_path / "root")
    annotate(folder, ["train/4.png"], ["test/4.png"])
    with pytest.raises(DataError, match="4 rows only"):
        run("PCAM", tmp_path / "raw", tmp_path / "root")
    assert not list(folder.rglob("*.png"))


def test_annotations_are_never_overwritten(tmp_path):
    zip_of(
        tmp_path / "a.zip",
        {f"{s}/{x}/p1.jpeg": png(1) for s in ("train", "test") for x in ("NORMAL", "PNEUMONIA")},
    )
    run("CXP", tmp_path / "a.zip", tmp_path / "root", annotations=True)
    before = everything(tmp_path / "root")
    run("CXP", tmp_path / "a.zip", tmp_path / "root", annotations=True)
    assert everything(tmp_path / "root") == before
    with pytest.raises(DataError, match="differs from what would be built"):
        run("CXP", tmp_path / "a.zip", tmp_path / "root", annotations=True, questions={"label": "Other?"})
    assert everything(tmp_path / "root") == before
    with pytest.raises(DataError, match="no question 'lable'; did you mean 'label'"):
        run("CXP", tmp_path / "a.zip", tmp_path / "root", annotations=True, questions={"lable": "Other?"})


QA = json.dumps({"image": "a", "question": "q", "answer": "b"})
MALFORMED = {
    "columns": ("HAM", "HAM10000_metadata.csv", "lesion_id,image_id\na,b\n", "line 1: no column dx"),
    "short row": (
        "HAM",
        "HAM10000_metadata.csv",
        "lesion_id,image_id,dx\na,b,c\na\n",
        "line 3: fewer fields than the header has",
    ),
    "long row": (
        "HAM",
        "HAM10000_metadata.csv",
        "lesion_id,image_id,dx\na,b,c, d\n",
        "line 2: more fields than the header has",
    ),
    "stray quote": (
        "HAM",
        "HAM10000_metadata.csv",
        'lesion_id,image_id,dx\na,b 5" wide,c\n',
        "line 2: a quote inside a field",
    ),
    "twice": ("HAM", "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx\na,b,c,d\n", "two columns are called dx"),
    "encoding": ("HAM", "HAM10000_metadata.csv", b"\xff\xfe", "not UTF-8"),
    "field": (
        "pathvqa",
        "qas/train/train_qa.json",
        '[{"image": "a", "question": "q"}]',
        "record 0: field 'answer' is missing",
    ),
    "form": ("pathvqa", "qas/train/train_qa.json", "{}", "expected a list, found dict"),
    "record": ("pathvqa", "qas/train/train_qa.json", "[3]", "record 0: should be a valid dictionary.*found 3"),
    "surrogate": (
        "pathvqa",
        "qas/train/train_qa.json",
        r'[{"image": "a", "question": "\ud83d", "answer": "b"}]',
        "record 0: field 'question': .*half of a surrogate pair",
    ),
    "surrogate in an answer": (
        "pathvqa",
        "qas/train/train_qa.jsonl",
        r'{"image": "a", "question": "b", "answer": "\ud83d"}',
        "line 1: field 'answer': .*half of a surrogate pair",
    ),
    "line": ("pathvqa", "qas/train/train_qa.jsonl", f"\n{QA}\n{QA[:-1]}\n", "line 3: not valid JSON"),
    "line's field": (
        "pathvqa",
        "qas/train/train_qa.jsonl",
        QA + '\n\n{"image": "a"}',
        "line 3: field 'question' is mis",
    ),
    "long cell": (
        "HAM",
        "HAM10000_metadata.csv",
        f'lesion_id,image_id,dx\na,b,"{"c" * 200_000}',
        "line 2: the row that begins there is quoted wrongly",
    ),
    "long heading": ("HAM", "HAM10000_metadata.csv", "c" * 200_000, "line 1: no column lesion_id"),
    "syntax": ("pathvqa", "qas/train/train_qa.json", "[", "not readable as json"),
    "number": ("pathvqa", "qas/train/train_qa.json", "[" + "1" * 5000 + "]", "not readable as json.*digits"),
    "no data": ("CXP", "train/NORMAL/a.jpeg", png(1), "1 training and 0 test rows"),
    "missing": ("pathvqa", "readme.txt", "", "train_qa.pkl or .*: not found in"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_releases_are_refused_with_their_place(case, tmp_path):
    dataset, name, content, message = MALFORMED[case]
    put(tmp_path / "raw" / name, content)
    with pytest.raises(DataError, match=message):
        run(dataset, tmp_path / "raw", tmp_path / "root", annotations=True)
    assert everything(tmp_path / "root") == {}


def test_the_catalogue_holds_the_eight_published_sets():
    rows = {name: (entry.test_rows.open, entry.test_rows.closed) for name, entry in catalog().items()}
    assert list(rows) == ["pathvqa", "slake-vqarad", "derm", "PCAM", "CXP", "HAM", "nmi", "iu-x-ray"]
    assert sum(a + b for a, b in rows.values()) == 23_229
    with pytest.raises(DataError, match="did you mean 'iu-x-ray'"):
        data_set("iu-xray")
    for entry in catalog().values():
        assert entry.modality in ("pathology", "radiology", "dermatology")
        assert entry.source.startswith("https://") and entry.license and entry.access and entry.raw


def test_the_page_on_data_agrees_with_the_catalogue():
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
    for name, entry in catalog().items():
        section = " ".join(page.partition(f"### `{name}`")[2].partition("###")[0].split())
        assert f"mslora-cr data prepare {name} --raw" in section
        assert f"Rows: {entry.test_rows.open} + {entry.test_rows.closed}" in section
        assert entry.modality in section and entry.license.split(",")[0].removeprefix("SLAKE ") in section
        assert all(word.rstrip("/") in section for word in entry.source.split() if word.startswith("https"))
