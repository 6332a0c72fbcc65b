"""The open stream on miniatures of its repositories, and on the true files where `MSLORA_OPEN_DATA` names them."""

import json
import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.data.open import catalog, download
from mslora_cr.data.open.catalog import OpenSource, open_sources
from mslora_cr.data.open.download import check_accepted, content_digest, download_open
from mslora_cr.data.open.layouts import Asked
from mslora_cr.data.open.prepare import on_test_side, prepare_open, wording
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.sources.annotations import annotation_rows
from mslora_cr.data.sources.catalog import data_set
from mslora_cr.data.sources.raw import RawData
from tests.helpers.open_stream import archive, miniatures, serving, write

ALL = list(open_sources().values())


@pytest.fixture(scope="module")
def clones(tmp_path_factory) -> Path:
    return miniatures(tmp_path_factory.mktemp("clones"))


@pytest.fixture(scope="module")
def root(clones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    written, missing = prepare_open(ALL, [clones], folder)
    assert not missing and len(written) == 8
    return folder


def records(folder: Path) -> tuple[list, list]:
    return list(TrainingRecords(folder / "train.json")), list(TestRecords(folder / "test.jsonl"))


def test_every_set_is_written_with_its_pictures_and_passes_the_check(root, capsys, tmp_path):
    names = ["BCCD", "BUSI", "CXP", "CXP-by-patient", "HAM10000", "VQA-RAD", "VQA-RAD-by-image", "nuclei"]
    assert sorted(folder.name for folder in root.iterdir() if not folder.name.startswith(".")) == sorted(names)
    for name in names:
        training, test = records(root / name)
        assert training and test
        assert all((root / name / image).is_file() for record in [*training, *test] for image in record.images)
    config = load_config("open")
    assert [task.name for task in config.tasks if task.name in names] == [task.name for task in config.tasks]
    place = [f"data.root={root}", "--workers", "1", "--output", str(tmp_path / "check.json")]
    assert main(["data", "check", "open", *place]) == 0  # as `data prepare` says
    cards = {line.split(": ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("data card")}
    assert "CC-BY-NC-4.0" in cards["HAM10000"] and "`data prepare open`" in cards["HAM10000"]
    assert "HAM10000: lesions: not named in training, " in cards["HAM10000"]
    assert "CXP-by-patient: patients: not named in training, " in cards["CXP-by-patient"]
    assert main(["data", "check", str(root), "data.root=x"]) == 1


def test_own_splits_share_pictures_and_patients_and_the_corrected_ones_do_not(root):
    for name, rows in {"VQA-RAD": 5, "CXP": 12, "VQA-RAD-by-image": 0, "CXP-by-patient": 0, "HAM10000": 0}.items():
        shared = json.loads((root / name / "prepared.json").read_text())["on_both_sides"]
        assert shared["test_rows"] == rows and bool(shared["groups"]) == bool(rows), name
    training, test = records(root / "HAM10000")
    lesions = [{int(Path(record.images[0]).stem[5:]) // 2 for record in side} for side in (training, test)]
    assert not lesions[0] & lesions[1]


def test_labels_become_answers_and_attributes(root):
    by_kind = {}
    for name in ("HAM10000", "BCCD", "nuclei", "CXP", "VQA-RAD"):
        for record in records(root / name)[1]:
            by_kind.setdefault((name, record.attributes["question"]), []).append(record)
    skin = by_kind["HAM10000", "diagnosis"][0]
    assert skin.attributes["box"] == "1 2 9 7" and skin.attributes["localisation"] == "back"
    assert skin.gt == skin.attributes["diagnosis"]
    for record in by_kind["HAM10000", "malignant"]:
        sick = record.attributes["diagnosis"] in ("melanoma", "basal cell carcinoma", "actinic keratosis")
        assert record.gt == ("yes" if sick else "no") and record.answer_type == "CLOSED"
    counts = {(record.images[0], record.attributes["cell"]): record.gt for record in by_kind["BCCD", "count"]}
    assert counts["images/BloodImage_8.jpg", "red blood cell"] == "8"
    assert counts["images/BloodImage_8.jpg", "platelet"] == "0"
    for record in by_kind["nuclei", "range"]:
        count = record.attributes["nuclei"]
        low, _, high = record.gt.partition(" to ")
        assert count > 100 if record.gt == "more than 100" else int(low) <= count <= int(high)
    assert {record.gt for record in by_kind["CXP", "cause"]} == {"bacterial", "viral"}
    rad = by_kind["VQA-RAD", "question"][0]
    assert rad.attributes["organ"] == "chest" and rad.attributes["question type"] == "PRES"


def test_bounded_rows_are_a_sample_in_their_order(clones, root, tmp_path):
    assert main(["data", "prepare", "open", "--raw", str(clones), "--root", str(tmp_path), "--most", "12", "3"]) == 0
    for name in ("HAM10000", "VQA-RAD"):
        whole, part = records(root / name), records(tmp_path / name)
        samples = [[(record.images, getattr(record, "turns", None)) for record in side] for side in part]
        order = [[(record.images, getattr(record, "turns", None)) for record in side] for side in whole]
        assert [len(side) for side in samples] == [12, 3]
        for sample, of_side in zip(samples, order, strict=True):
            rest = iter(of_side)
            assert all(row in rest for row in sample) and sample != of_side[: len(sample)]
        images = {image for side in part for record in side for image in record.images}
        assert {
            str(path.relative_to(tmp_path / name)) for path in (tmp_path / name / "images").rglob("*.jpg")
        } == images
    assert main(["data", "prepare", "CXP", "--raw", str(clones), "--most", "1", "1"]) == 1


def test_wordings_and_sides_follow_the_documented_rule(root):
    source = open_sources()["BUSI"]
    # By sha256sum, "a.png lesion" gives 98529145…, 1 modulo 3, and "BUSI/a.png" gives 2046cbe8…, 12.6 % of 2 ** 32.
    assert wording(source, "a.png", Asked("lesion", "yes", "CLOSED")) == source.wordings["lesion"][1]
    assert on_test_side("BUSI", "a.png")
    training, test = records(root / "BUSI")
    texts = {turn.text.removeprefix("<image>\n") for record in training for turn in record.turns[:1]}
    assert texts == {text for kind in source.wordings.values() for text in kind}
    for record in test:
        assert on_test_side("BUSI", str(record.patient))
    # three pictures of one content, one of each kind: copies stay together
    sides = [{Path(record.images[0]).stem.partition(" ")[2] for record in side} for side in (training, test)]
    numbers = [{int(name.strip("()")) // 3 for name in side} for side in sides]
    assert not numbers[0] & numbers[1]


def test_the_command_names_what_is_missing_and_refuses_foreign_folders(clones, tmp_path, capsys):
    words = ["data", "prepare", "open", "--raw", str(clones / "busi"), "--root", str(tmp_path / "root")]
    assert main([*words, "--copy"]) == 1
    said = capsys.readouterr().out
    assert "not in the raw download: HAM10000 (github.com/mmalek06/" in said
    assert main([*words, "--only", "BUSI"]) == 0
    (tmp_path / "root" / "BUSI" / "prepared.json").unlink()
    with pytest.raises(DataError, match="already there, and not from data prepare open"):
        prepare_open(ALL, [clones / "busi"], tmp_path / "root")
    with pytest.raises(DataError, match="nothing of the open stream there"):
        prepare_open(ALL, [tmp_path], tmp_path / "other")
    assert main([*words, "--only", "BUSY"]) == 1


def test_damaged_labels_are_named(clones, tmp_path):
    sources = {source.name: source for source in ALL}
    for name, path, content, message in (
        ("VQA-RAD", "data/trainset.json", "[{}]", "trainset.json: .*qid"),
        ("VQA-RAD", "data/trainset.json", "{", "trainset.json"),
        ("HAM10000", "data/HAM10000_metadata.csv", "a,b\n1,2\n", "line 2: expected the columns"),
        ("BCCD", "BCCD/Annotations/BloodImage_0.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><a/>", "document type"),
        ("BCCD", "BCCD/Annotations/BloodImage_0.xml", "<a>", "not XML"),
    ):
        folder = {"VQA-RAD": "med-vqa", "HAM10000": "ham", "BCCD": "BCCD_Dataset"}[name]
        packed = archive(clones / folder, tmp_path / f"{name}.zip", "top")
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        zipfile.ZipFile(packed).extractall(damaged)
        (damaged / "top" / path).write_text(content)
        with pytest.raises(DataError, match=message):
            prepare_open([sources[name]], [damaged], tmp_path / "out")


@pytest.fixture
def site(clones, tmp_path):
    """The stand-in with BUSI's archive, and the source with the digest of the miniature."""
    source = open_sources()["BUSI"]
    source = source.model_copy(update={"content": content_digest(source, [clones / "busi"], tmp_path / "work")})
    packed = archive(clones / "busi", tmp_path / "busi.zip", f"BMI702_project-{source.commit}")
    with serving({f"/{source.repository}/archive/{source.commit}.zip": packed.read_bytes()}) as server:
        yield server, source


def test_a_broken_download_goes_on_where_it_stopped(site, tmp_path, monkeypatch):
    server, source = site
    [path] = server.files
    server.cut[path] = [1000, 2000]
    found = download_open(source, tmp_path / "a", server.url)
    assert found.read_bytes() == server.files[path]
    assert [asked for _, asked in server.asked] == [None, "bytes=1000-", "bytes=3000-"]
    server.cut[path] = [500]
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(DataError, match="run the same command again to resume"):
        download_open(source, tmp_path / "b", server.url)
    server.ranges = False  # as a site that packs archives as they are asked for
    assert download_open(source, tmp_path / "b", server.url).read_bytes() == server.files[path]
    asked = len(server.asked)
    download_open(source, tmp_path / "b", server.url)
    assert len(server.asked) == asked


def test_other_content_and_other_archives_are_refused(site, tmp_path):
    server, source = site
    [path] = server.files
    lock = tmp_path / "lock.json"
    first = download_open(source, tmp_path / "a", server.url, lock=lock)
    entry = json.loads(lock.read_text())["assets"][f"github/{source.repository}"]
    assert entry["revision"] == source.commit and entry["files"][first.name]["size"] == len(server.files[path])
    repacked = archive_again(first, tmp_path / "again.zip")
    server.files[path] = repacked
    with pytest.raises(DataError, match=r"not as .*lock\.json records"):
        download_open(source, tmp_path / "b", server.url, lock=lock)
    download_open(source, tmp_path / "b", server.url, lock=lock, update=True)  # the same files, packed otherwise
    changed: OpenSource = source.model_copy(update={"content": "0" * 64})
    with pytest.raises(DataError, match="holds other files than commit"):
        download_open(changed, tmp_path / "c", server.url)
    assert not list((tmp_path / "c").glob("*.zip"))
    with pytest.raises(DataError, match="answers 404"):
        download_open(source.model_copy(update={"commit": "1" * 40}), tmp_path / "d", server.url)


def archive_again(packed: Path, path: Path) -> bytes:
    """The same members, compressed."""
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return path.read_bytes()


def test_licences_are_accepted_by_name_and_those_without_commercial_use_apart(site, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        DataError, match=r"HAM10000: CC-BY-NC-4.0.*--accept CC0-1.0 .*--accept-non-commercial CC-BY-NC-4.0 BUSI"
    ):
        check_accepted(ALL, [], [])
    with pytest.raises(DataError, match=r"--accept-non-commercial CC-BY-NC-4\.0"):
        check_accepted([open_sources()["HAM10000"]], ["CC-BY-NC-4.0"], [])  # not among the others
    server, source = site
    monkeypatch.setattr(catalog, "open_sources", lambda: {"BUSI": source})
    words = ["data", "download", "open", "--root", str(tmp_path / "x"), "--endpoint", server.url]
    words += ["--lock", str(tmp_path / "lock.json")]
    assert main(words) == 1 and not server.asked
    assert main([*words, "--accept-non-commercial", "BUSI"]) == 0
    assert "no commercial use" in capsys.readouterr().out


def test_vqa_rad_of_the_repository_does_for_the_published_set(clones, tmp_path):
    slake = [
        {"img_name": "a.jpg", "question": f"{lang}?", "answer": "CT", "answer_type": "OPEN", "q_lang": lang}
        for lang in ("en", "zh")
    ]
    for side in ("train", "test"):
        write(tmp_path / "Slake1.0" / f"{side}.json", json.dumps(slake))
    with RawData([tmp_path, clones / "med-vqa"], tmp_path / "work") as raw:
        rows = list(annotation_rows(data_set("slake-vqarad"), raw))
    test = [row for row in rows if row.split == "test"]
    assert (len(rows) - len(test), len(test)) == (1 + 35, 1 + 5)
    assert [(row.id, row.image) for row in test[:2]] == [(1, "Slake_images/a.jpg"), (1, "VqaRad_images/synpic15.jpg")]


@pytest.mark.skipif("MSLORA_OPEN_DATA" not in os.environ, reason="MSLORA_OPEN_DATA names no clones of the open stream")
def test_the_true_files_give_the_measured_numbers(tmp_path):
    place = Path(os.environ["MSLORA_OPEN_DATA"])
    for source in ALL:
        assert content_digest(source, [place], tmp_path / "work") == source.content, source.name
    written, missing = prepare_open(ALL, [place], tmp_path / "root")
    found = {prepared.name: prepared.summary() for prepared in written}
    assert not missing
    assert found["VQA-RAD"]["on_both_sides"] == {"images": 203, "groups": 203, "test_rows": 451}
    assert found["CXP"]["on_both_sides"] == {"images": 0, "groups": 264, "test_rows": 1152}
    rows = {name: (sides["train"]["rows"], sides["test"]["rows"]) for name, sides in found.items()}
    assert rows == {
        "VQA-RAD": (3064, 451),
        "VQA-RAD-by-image": (2699, 816),
        "CXP": (14307, 1638),
        "CXP-by-patient": (12622, 3323),
        "HAM10000": (16064, 3966),
        "BUSI": (1230, 330),
        "BCCD": (1752, 432),
        "nuclei": (1084, 244),
    }
    with RawData([place], tmp_path / "work") as raw:
        published = Counter((row.split, row.answer_type) for row in annotation_rows(data_set("slake-vqarad"), raw))
    assert (published["test", "OPEN"], published["test", "CLOSED"]) == (824, 688)
