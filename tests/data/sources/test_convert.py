"""`mslora-cr data convert`, on real DICOM, NIfTI and photographs that packages ship."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mslora_cr.cli.main import main
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.rows.read import Columns
from mslora_cr.data.sources.convert import Split, convert, convert_images
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.rendering import Rendering, windowed
from tests.helpers.real_data import DICOM, SKIMAGE, STARDIST, TEST_DATA, real

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"
VOLUME = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"


def drawn(path, frame=None, **rendering):
    """The pictures of a file, as arrays."""
    found = []
    for _, data in pictures(path, frame, Rendering(**rendering)):
        found.append(np.asarray(Image.open(io.BytesIO(data))))
    return found


def rows_of(folder):
    return TrainingRecords(folder / "train.json"), TestRecords(folder / "test.jsonl")


def table(path, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


def photographs(folder, count=6):
    for number in range(count):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{number}.png")


def test_a_window_maps_values_as_the_standard_says():
    # C.11.2.1.2.1: with c = 2048, w = 4096 the input range is 0..4095, from black to white
    assert windowed(np.array([-1, 0, 4095, 5000]), 2048, 4096) == pytest.approx([0, 0, 1, 1])
    assert windowed(np.array([2047.5]), 2048, 4096) == pytest.approx(0.5)
    assert windowed(np.array([0, 50, 100]), 50, 100, "LINEAR_EXACT") == pytest.approx([0, 0.5, 1])
    assert windowed(np.array([50, 1e6]), 50, 100, "SIGMOID") == pytest.approx([0.5, 1])
    assert windowed(np.array([0, 1]), 0.5, 0.0) == pytest.approx([0, 1])


def test_ct_is_shown_under_its_own_window_or_the_one_given():
    path = real(DICOM / "693_UNCR.dcm")
    header = pydicom.dcmread(path)
    hounsfield = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    [rendered] = drawn(path)
    assert rendered.shape == (512, 512) and rendered.dtype == np.uint8
    assert rendered == pytest.approx(np.round(255 * windowed(hounsfield, 40, 100)))
    [bone] = drawn(path, window=(500, 2000))
    assert bone == pytest.approx(np.round(255 * windowed(hounsfield, 500, 2000)))
    assert (rendered == 255).mean() > (bone == 255).mean()  # the skull saturates under the brain's window only


def test_monochrome1_is_inverted():
    path = real(DICOM / "RG1_UNCR.dcm")
    header = pydicom.dcmread(path)
    assert header.PhotometricInterpretation == "MONOCHROME1"
    [rendered] = drawn(path)
    raw = header.pixel_array
    lung, around = rendered[raw > np.percentile(raw, 95)], rendered[raw < np.percentile(raw, 5)]
    assert lung.mean() < around.mean()


def test_frames_colour_and_what_a_viewer_would_refuse():
    frames = drawn(real(DICOM / "emri_small.dcm"))
    assert len(frames) == 10 and {frame.shape for frame in frames} == {(64, 64)}
    assert len(drawn(DICOM / "emri_small.dcm", most_frames=3)) == 3
    [fifth] = drawn(DICOM / "emri_small.dcm", frame=5)
    assert (fifth == frames[5]).all()
    [palette] = drawn(PACKAGED / "examples_palette.dcm")
    assert palette.ndim == 3 and len(np.unique(palette)) > 50
    [colour] = drawn(PACKAGED / "examples_ybr_color.dcm", frame=0)
    assert colour.shape[2] == 3
    with pytest.raises(DataError, match="has no frame 10; its 10 are counted from 0"):
        drawn(DICOM / "emri_small.dcm", frame=10)
    with pytest.raises(DataError, match=r"MR_truncated\.dcm: its pixels cannot be read"):
        drawn(PACKAGED / "MR_truncated.dcm")
    with pytest.raises(DataError, match=r"rtplan\.dcm: not a DICOM image"):
        drawn(PACKAGED / "rtplan.dcm")


def test_nifti_slices_stand_as_radiologists_look_at_them(tmp_path):
    slices = drawn(VOLUME)
    assert len(slices) == 25 and slices[0].shape == (41, 33)
    marked = np.zeros((3, 4, 2), dtype=np.float32)
    marked[2, 3, 0] = 1  # most right, most anterior, lowest slice, in a volume whose axes are R, A, S
    nibabel.save(nibabel.Nifti1Image(marked, np.eye(4)), tmp_path / "marked.nii.gz")
    lowest, _ = drawn(tmp_path / "marked.nii.gz", window=(0.5, 1))
    assert lowest.shape == (4, 3) and lowest[0, 0] == 255 and (lowest > 0).sum() == 1
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    with pytest.raises(DataError, match=r"broken\.nii: not a NIfTI volume"):
        drawn(tmp_path / "broken.nii")


def test_photographs_stay_as_they_are():
    for path in (SKIMAGE / "retina.jpg", SKIMAGE / "ihc.png", SKIMAGE / "microaneurysms.png", STARDIST / "img2d.tif"):
        [(_, data)] = pictures(real(path), None, Rendering())
        assert data == path.read_bytes()


def test_a_table_becomes_a_data_set_split_by_patient(tmp_path):
    photographs(tmp_path)
    rows = [("picture", "question", "finding", "patient_id")]
    rows += [
        (f"{number}.png", f"What is in {number}?", "yes" if number % 2 else "a naevus", f"p{number // 2}")
        for number in range(6)
    ]
    rows += [
        ("gone.png", "What?", "nothing", "p9"),
        ("../outside.png", "What?", "nothing", "p9"),
        ("1.png", "", "x", "p0"),
    ]
    source = table(tmp_path / "mine.csv", rows)
    words = ["data", "convert", str(source), "--output", str(tmp_path / "out" / "Mine"), "--image", "picture"]
    assert main([*words, "--answer", "finding", "--test-share", "0.3"]) == 0
    training, test = rows_of(tmp_path / "out" / "Mine")
    patients = [{int(Path(name).stem) // 2 for record in side for name in record.images} for side in (training, test)]
    assert not patients[0] & patients[1]
    assert (len(training), len(test)) == (4, 2)
    assert {record.answer_type for record in test} == {"CLOSED", "OPEN"}
    assert training[0].turns[0].text.startswith("<image>\nWhat is in ")
    report = json.loads((tmp_path / "out" / "Mine" / "convert.json").read_text())
    assert report["grouped_by"] == "patient" and report["images"] == 6
    left_out = report["left_out"]
    assert left_out["no question"] == {"count": 1, "examples": ["mine.csv: line 10"]}
    assert left_out["an image that is missing or cannot be read"]["count"] == 2

    again = tmp_path / "again"
    convert(source, again, Columns(image="picture", answer="finding"), split=Split(0.3))
    assert (again / "test.jsonl").read_bytes() == (tmp_path / "out" / "Mine" / "test.jsonl").read_bytes()
    with pytest.raises(
        DataError, match=r"no column 'findings'; did you mean 'finding'\?.*Name the column with --answer"
    ):
        convert(source, again, Columns(image="picture", answer="findings"))
    with pytest.raises(DataError, match="already there, and not from data convert"):
        convert(source, tmp_path, Columns(image="picture", answer="finding"))


def test_rows_that_share_an_image_stay_together_and_a_split_of_the_source_is_kept(tmp_path):
    photographs(tmp_path, 3)
    asked = [(f"{number % 3}.png", f"Question {number}?", "yes") for number in range(9)]
    source = table(tmp_path / "own.csv", [("image", "question", "answer"), *asked])
    convert(source, tmp_path / "a")
    training, test = ({name for record in side for name in record.images} for side in rows_of(tmp_path / "a"))
    assert len(training) == 2 and len(test) == 1
    parts = [("image", "question", "answer", "part"), ("0.png", "a?", "x", "train"), ("0.png", "b?", "x", "Test")]
    parts += [("1.png", "c?", "x", "val"), ("1.png", "d?", "x", "spare"), ("2.png", "e?", "x", "train")]
    found = convert(table(tmp_path / "parts.csv", parts), tmp_path / "b", Columns(split="part"))
    assert (found.train, found.test, found.shared_groups) == (2, 1, ["images/0.png"])
    assert set(found.left_out) == {"a split called 'spare'"}
    [validation] = TestRecords(tmp_path / "b" / "val.jsonl")
    assert (validation.text, validation.gt, found.validation) == ("c?", "x", 1)
    with pytest.raises(DataError, match="the test side is empty: 1 rows of 1 groups"):
        convert(table(tmp_path / "one.csv", parts[:2]), tmp_path / "c")


def test_sharegpt_keeps_conversations_for_training(tmp_path):
    photographs(tmp_path, 4)
    chats = [
        {
            "image": f"{number}.png",
            "conversations": [
                {"from": "system", "value": "You are kind."},
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "Skin."},
                {"from": "human", "value": "Is it benign?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for number in range(4)
    ]
    chats += [{"image": "0.png", "conversations": [{"from": "gpt", "value": "?"}]}, {"image": "0.png"}]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    found = convert(tmp_path / "chats.json", tmp_path / "out")
    training, test = rows_of(tmp_path / "out")
    assert [turn.text for turn in training[0].turns] == ["<image>\nWhat is it?", "Skin.", "Is it benign?", "Yes."]
    assert (test[0].text, test[0].gt) == ("What is it?", "Skin.")
    assert set(found.left_out) == {
        "turns that do not alternate from a question to an answer",
        "no list of conversations",
        "the later questions of a conversation on the test side",
    }


def test_a_datasets_folder_has_its_images_inside(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    photographs(tmp_path, 6)
    note = {"info": {"features": {"label": {"names": ["naevus", "melanoma"], "_type": "ClassLabel"}}}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata={"huggingface": json.dumps(note)})
    for split, numbers in {"train": range(4), "test": range(4, 6)}.items():
        values = [{"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": None} for number in numbers]
        content = pa.table({"image": values, "label": [number % 2 for number in numbers]}, schema=schema)
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
            out.write_table(content)
        (tmp_path / "hub").mkdir(exist_ok=True)
        parquet.write_table(content, tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    words = ["--ask", "What is it?", "--answer", "label", "--closed"]
    for source in ("saved", "hub"):
        assert (
            main(["data", "convert", str(tmp_path / source), "--output", str(tmp_path / "out" / source), *words]) == 0
        )
        training, test = rows_of(tmp_path / "out" / source)
        assert [record.turns[1].text for record in training] == ["naevus", "melanoma"] * 2
        assert [(record.gt, record.answer_type) for record in test] == [("naevus", "CLOSED"), ("melanoma", "CLOSED")]
        assert len(list((tmp_path / "out" / source / "images").iterdir())) == 6


def test_images_alone_keep_their_tree(tmp_path):
    scans = tmp_path / "scans" / "a"
    scans.mkdir(parents=True)
    (scans / "MR").write_bytes((PACKAGED / "MR_small.dcm").read_bytes())  # an archive's files have no ending
    (scans / "notes.txt").write_text("no image")
    (tmp_path / "scans" / "bad.dcm").write_bytes(b"damaged")
    found = convert_images(tmp_path / "scans", tmp_path / "png")
    assert [path.name for path in (tmp_path / "png").rglob("*.png")] == ["MR.png"]
    assert (found.images, len(found.left_out["an image that cannot be read"])) == (1, 1)
    with pytest.raises(DataError, match="no DICOM or NIfTI file there"):
        convert_images(SKIMAGE.parent / "nowhere", tmp_path / "x")


def page_blocks():
    """The commands of docs/tutorials/your-data.md that are to be run, by block."""
    text = (Path(__file__).parents[3] / "docs" / "tutorials" / "your-data.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split("```bash\n")[1:]]


def run_page(folder, model, blocks):
    (folder / "samples").symlink_to(real(TEST_DATA))
    (folder / "pretrained_models").mkdir()
    (folder / "pretrained_models" / "demo").symlink_to(model.parent)
    program = f'mslora-cr() {{ "{sys.executable}" -m mslora_cr "$@"; }}\nset -e\n' + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pages_commands_convert_and_check_real_images(tmp_path, tiny_model):
    blocks = page_blocks()
    assert "mslora-cr train" in blocks[-1] and len(blocks) == 4
    said = run_page(tmp_path, tiny_model, blocks[:3])
    assert "19 rows: 15 for training, 4 for testing, by patient\n" in said
    assert "0 errors; written to" in said


@pytest.mark.long
def test_the_pages_commands_train_and_report(tmp_path, tiny_model):
    run_page(tmp_path, tiny_model, page_blocks())
    assert (tmp_path / "results" / "exams" / "report.html").is_file()
