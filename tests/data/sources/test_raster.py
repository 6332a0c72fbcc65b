"""Pages, EXIF orientation and more than 8 bits."""

import io

import numpy as np
import pytest
from PIL import Image

from mslora_cr.data.images import washed_out
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.convert_images import pictures
from mslora_cr.data.sources.rendering import Rendering


def drawn(path, frame=None, **rendering):
    notes = []
    found = list(pictures(path, frame, Rendering(**rendering), notes.append))
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int) for _, data in found], notes


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_every_page_becomes_a_picture(ending, tmp_path):
    pages = [Image.new("RGB", (8, 6), (60 * number, 0, 0)) for number in range(4)]
    path = tmp_path / f"a.{ending}"
    pages[0].save(path, save_all=True, append_images=pages[1:], **({"lossless": True} if ending == "webp" else {}))
    found, _ = drawn(path)
    assert [int(picture[0, 0, 0]) for picture in found] == pytest.approx([0, 60, 120, 180], abs=2)
    [third], _ = drawn(path, frame=2)
    assert third[0, 0, 0] == pytest.approx(120, abs=2)
    assert len(drawn(path, most_frames=1)[0]) == 1
    assert "4 pages, of which the model sees the first" in str(washed_out(path))
    with pytest.raises(DataError, match="has no frame 4"):
        drawn(path, frame=4)


def test_previews_in_a_tiff_are_no_pages(tmp_path):
    pages = [Image.new("RGB", (80, 60), "red"), Image.new("RGB", (8, 6), "red")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    found, notes = drawn(tmp_path / "a.tif")
    assert [picture.shape for picture in found] == [(60, 80, 3)] and "previews" in notes[0]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_a_picture_on_its_side_is_written_upright(ending, tmp_path):
    picture = Image.new("RGB", (64, 48), "black")
    picture.paste("white", (0, 0, 20, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / f"a.{ending}", exif=exif)
    [upright], notes = drawn(tmp_path / f"a.{ending}")
    assert upright.shape == (64, 48, 3) and upright[:16].min() > 200 and upright[30:].max() < 50
    if ending != "tif":  # which Pillow turns by itself
        assert "upright" in notes[0] and "EXIF" in str(washed_out(tmp_path / f"a.{ending}"))


def test_more_than_8_bits_are_stretched_or_windowed(tmp_path):
    values = np.linspace(1000, 3000, 10_000).reshape(100, 100).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    [stretched], notes = drawn(tmp_path / "a.png")
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.round(255 * np.clip((values - low) / (high - low), 0, 1))
    assert np.abs(stretched[..., 0] - expected).max() == 0 and "--window" in notes[0]
    [windowed], notes = drawn(tmp_path / "a.png", window=(2000, 1000))
    assert not notes and (windowed[0, 0, 0], windowed[50, 0, 0], windowed[-1, -1, 0]) == (0, 128, 255)
    Image.fromarray((values / 3000).astype(np.float32)).save(tmp_path / "b.tif")
    assert len(np.unique(drawn(tmp_path / "b.tif")[0][0])) > 200
    Image.fromarray(values // 20).save(tmp_path / "c.png")  # fits into 8 bits: nothing is lost, nothing is changed
    [(suffix, data)] = pictures(tmp_path / "c.png", None, Rendering())
    assert (suffix, data) == (".png", (tmp_path / "c.png").read_bytes())


def test_transparent_parts_are_drawn_white(tmp_path):
    picture = Image.new("RGBA", (8, 6), (200, 0, 0, 255))
    picture.paste((0, 9, 0, 0), (0, 0, 4, 6))
    picture.paste((0, 0, 0, 128), (7, 0, 8, 6))
    picture.save(tmp_path / "a.png")
    [seen], notes = drawn(tmp_path / "a.png")
    assert seen[0, [0, 5, 7]].tolist() == [[255] * 3, [200, 0, 0], [127] * 3] and "white" in notes[0]
    pages = [picture, Image.new("RGBA", (8, 6), (0, 0, 9, 0))]
    pages[0].save(tmp_path / "b.webp", save_all=True, append_images=pages[1:], lossless=True)
    assert drawn(tmp_path / "b.webp")[0][0][0, 0].tolist() == [255] * 3


def test_a_telephones_jpeg_with_a_second_picture_stays_one(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 3))])
    [(suffix, data)] = pictures(tmp_path / "a.jpg", None, Rendering())
    assert suffix == ".jpeg" and data == (tmp_path / "a.jpg").read_bytes()


def test_16_bits_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 100).save(tmp_path / "a.png", exif=exif)
    [upright], notes = drawn(tmp_path / "a.png")
    assert upright.shape == (8, 6, 3) and upright[0, 0, 0] > upright[0, -1, 0] and "upright" in notes[0]


def test_white_may_be_zero(tmp_path):
    Image.fromarray(np.array([[0, 60000]], np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as stored:
        negative = stored.tag_v2[262] == 0
    [picture], _ = drawn(tmp_path / "a.tif")
    assert (picture[0, 0, 0] > picture[0, 1, 0]) == negative
    Image.fromarray(np.array([[0, 200]], np.uint16)).save(tmp_path / "b.tif", tiffinfo={262: 0})
    [picture], _ = drawn(tmp_path / "b.tif")  # its values fit into 8 bits, but Pillow leaves the negative
    assert picture[0, 0, 0] > picture[0, 1, 0]
