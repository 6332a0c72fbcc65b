"""CT volumes for MedGemma: slices of a series or a volume, three windows as colours."""

import json

import numpy as np
import pytest
from PIL import Image

from mslora_cr.cli.main import main
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.rendering import MEDGEMMA_WINDOWS, Rendering, in_colours

pydicom, nibabel = pytest.importorskip("pydicom"), pytest.importorskip("nibabel")

from tests.helpers.dicom import dicom, saved  # noqa: E402

CT = {"Modality": "CT", "RescaleIntercept": -1024, "RescaleSlope": 1, "SeriesInstanceUID": "1.2.3"}
ORIENTATION = [1, 0, 0, 0, 1, 0]


def series(folder, slices=6, **tags):
    """Files whose names run against their positions; the tissue of slice k has 10 k HU."""
    folder.mkdir(parents=True)
    for place in range(slices):
        values = np.full((8, 8), 1024 + 10 * place, np.uint16)
        data = dicom(values, **CT, ImagePositionPatient=[0, 0, 3 * place], ImageOrientationPatient=ORIENTATION, **tags)
        saved(data, folder / f"{slices - place}.dcm")
    (folder / "notes.txt").write_text("no slice")
    return folder


def test_three_windows_are_the_published_ones():
    # 0 HU: (0 + 100) / 2250 + 1/2 = 0.544, (0 - 40) / 350 + 1/2 = 0.386, (0 - 40) / 80 + 1/2 = 0
    [[colour]] = in_colours(np.array([[0]]), MEDGEMMA_WINDOWS)
    assert np.round(255 * colour).tolist() == [139, 98, 0]
    [[bone]] = in_colours(np.array([[1500]]), MEDGEMMA_WINDOWS)
    assert bone.tolist() == [1, 1, 1]


def test_slices_stand_in_the_order_of_their_position(tmp_path):
    folder = series(tmp_path / "scan")
    found = [data for _, data in pictures(folder, None, Rendering(ct_windows=MEDGEMMA_WINDOWS))]
    (tmp_path / "a.png").write_bytes(found[4])
    assert len(found) == 6
    expected = np.round(255 * in_colours(np.full((8, 8), 40), MEDGEMMA_WINDOWS))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == expected).all()
    assert [suffix for suffix, _ in pictures(folder, None, Rendering(most_frames=2))] == ["-f001.png", "-f004.png"]
    with pytest.raises(DataError, match="no DICOM files in this folder"):
        list(pictures(tmp_path, None, Rendering()))
    saved(dicom(np.zeros((8, 8), np.uint16), **{**CT, "SeriesInstanceUID": "9.9"}), folder / "x.dcm")
    with pytest.raises(DataError, match="contains 2 series"):
        list(pictures(folder, None, Rendering()))


def test_windows_of_ct_are_refused_elsewhere(tmp_path):
    rendering = Rendering(ct_windows=MEDGEMMA_WINDOWS)
    saved(dicom(np.zeros((8, 8), np.uint16), Modality="MR"), tmp_path / "a.dcm")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    for name in ("a.dcm", "b.png"):
        with pytest.raises(DataError, match=rf"{name}: .*only for CT"):
            list(pictures(tmp_path / name, None, rendering))


def test_the_command_shows_slices_before_the_question_and_counts_positions(tmp_path, capsys):
    for number in range(3):
        series(tmp_path / f"scan{number}", 4)
    volume = np.full((6, 6, 9), 40, np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "volume.nii.gz")
    rows = [f"scan{number},Is there a bleed?,no" for number in range(3)] + ["volume.nii.gz,Is there a bleed?,yes"]
    (tmp_path / "t.csv").write_text("image,question,answer\n" + "\n".join(rows) + "\n")
    words = ["data", "convert", str(tmp_path / "t.csv"), "--output", str(tmp_path / "out"), "--ct-windows", "medgemma"]
    assert main([*words, "--frames", "3"]) == 0
    said = capsys.readouterr().out
    assert "up to 3 images per row: 780 positions of MedGemma, at 260 an image" in said
    assert f"data: {{root: {tmp_path}, images: all, max_length: {780 + 512}}}" in said
    record = json.loads((tmp_path / "out" / "train.json").read_text())[0]
    assert len(record["image"]) == 3 and record["conversations"][0]["value"] == "<image>\nIs there a bleed?"
    with Image.open(tmp_path / "out" / record["image"][0]) as image:
        assert image.mode == "RGB"
    assert main([*words, "--window", "40", "400"]) == 1
