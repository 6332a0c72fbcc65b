"""NIfTI volumes of a few voxels."""

import io

import numpy as np
import pytest
from PIL import Image

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.rendering import NOT_SQUARE, Rendering

nibabel = pytest.importorskip("nibabel")


def drawn(path, **rendering):
    notes = []
    found = list(pictures(path, None, Rendering(**rendering), notes.append))
    return [np.asarray(Image.open(io.BytesIO(data))).astype(int) for _, data in found], notes


def saved(values, path, affine=None, **header):
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def test_a_ball_in_thick_sagittal_slices_stays_round(tmp_path):
    x, y, z = np.mgrid[:12, :60, :60]
    ball = np.where(((x - 6) * 5) ** 2 + (y - 30) ** 2 + (z - 30) ** 2 < 27**2, 1000, 0).astype(np.int16)
    [middle], notes = drawn(saved(ball, tmp_path / "a.nii.gz", np.diag([5, 1, 1, 1])), most_frames=1)
    height, width = (np.ptp(np.nonzero(middle > 127)[axis]) + 1 for axis in (0, 1))
    assert middle.shape == (60, 60) and 0.9 < width / height < 1.1 and notes == [NOT_SQUARE]


def test_colour_is_shown_and_complex_numbers_are_refused(tmp_path):
    colour = np.zeros((3, 4, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colour[2, 3, 0] = (10, 20, 30)  # the most right, the most anterior
    lowest, _ = drawn(saved(colour, tmp_path / "a.nii"))[0]
    assert lowest.shape == (4, 3, 3) and lowest[0, 0].tolist() == [10, 20, 30] and lowest.sum() == 60
    with pytest.raises(DataError, match=r"b\.nii: complex numbers"):
        drawn(saved(np.ones((2, 2, 2), np.complex64), tmp_path / "b.nii"))


def test_the_range_is_the_files_own_or_that_of_its_finite_values(tmp_path):
    values = np.zeros((4, 4, 1), np.float32)
    values[0, 0], values[1, 1] = 100, 50
    [slice_image], _ = drawn(saved(values, tmp_path / "a.nii", cal_min=0, cal_max=200))
    assert slice_image.max() == 128
    values[2, 2], values[3, 3] = np.nan, np.inf
    [finite], _ = drawn(saved(values, tmp_path / "b.nii"))
    assert sorted(set(finite.ravel().tolist()))[-1] == 255 and len(set(finite.ravel().tolist())) == 3
    mostly = np.zeros((20, 20, 5), np.int16)
    mostly[0, 0, 0], mostly[1, 0, 0] = 100, 50  # fewer than one in two hundred
    [lowest, *_], _ = drawn(saved(mostly, tmp_path / "c.nii"))
    assert {128, 255} <= set(lowest.ravel().tolist())


def test_a_header_that_claims_more_voxels_than_there_are_is_refused(tmp_path):
    path = saved(np.zeros((2, 2, 2), np.int16), tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([900, 900, 900], "<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.nii: not a NIfTI volume \(a file of this size"):
        drawn(path)
