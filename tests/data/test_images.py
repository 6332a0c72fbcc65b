import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mslora_cr.data.images import (
    MAX_PIXELS,
    check_images,
    image_roots,
    load_image,
    pad_to_square,
    preprocess,
    resolve_image,
)
from mslora_cr.data.records import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_a"


def picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header promises `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_pixels_equal_the_golden_ones():
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(GOLDEN / "clip-tiny-patch14", backend="pil")
    golden = load_file(GOLDEN / "pixel_values.safetensors")
    assert len(golden) == 7
    for name, expected in golden.items():
        path = next(GOLDEN.rglob(name)) if "." in name else next((GOLDEN / "images").glob(f"{name}.*"))
        pixels = preprocess(load_image(path), processor)
        assert pixels.shape == expected.shape
        assert np.abs(pixels.numpy() - expected).max() <= 1e-5, name


def test_padding_takes_the_lower_of_two_middles():
    red = Image.new("RGB", (4, 1), (255, 0, 0))
    padded = np.asarray(pad_to_square(red, (1, 2, 3)))
    assert padded.shape == (4, 4, 3)
    assert (padded[1] == (255, 0, 0)).all()  # (4 - 1) // 2 = 1
    assert (padded[[0, 2, 3]] == (1, 2, 3)).all()
    tall = np.asarray(pad_to_square(red.rotate(90, expand=True), (1, 2, 3)))
    assert (tall[:, 1] == (255, 0, 0)).all()
    square = Image.new("RGB", (3, 3))
    assert pad_to_square(square, (9, 9, 9)) is square


def test_names_are_looked_up_in_the_roots_in_order(tmp_path):
    roots = image_roots(tmp_path, "Task", ["images"])
    inner = picture(tmp_path / "Task" / "images" / "a.png")
    assert resolve_image("a.png", roots) == inner
    assert resolve_image("images/a.png", roots) == inner
    assert resolve_image("./Task/images/a.png", roots) == inner
    outer = picture(tmp_path / "Task" / "a.png")
    assert resolve_image("a.png", roots) == outer


def test_a_linked_image_folder_is_followed(tmp_path):
    target = picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "root" / "Task").mkdir(parents=True)
    (tmp_path / "root" / "Task" / "images").symlink_to(target.parent)
    assert resolve_image("images/a.png", image_roots(tmp_path / "root", "Task")).read_bytes() == target.read_bytes()


def test_a_name_in_another_unicode_form_is_found(tmp_path):
    short, long = (unicodedata.normalize(form, "œdème/aplasía.png") for form in ("NFC", "NFD"))
    roots = image_roots(tmp_path, "task")
    with pytest.raises(DataError, match="is missing"):
        resolve_image(short, roots)
    placed = picture(tmp_path / "task" / long)
    assert resolve_image(short, roots) == resolve_image(long, roots) == placed
    exact = picture(tmp_path / short)
    assert resolve_image(short, roots) == exact  # a name as it is written comes first


def test_a_missing_image_is_reported_with_every_place(tmp_path):
    with pytest.raises(DataError, match="is missing") as caught:
        resolve_image("x/a.png", image_roots(tmp_path, "Task", ["images"]))
    for place in ("Task/x/a.png", "x/a.png", "Task/images/x/a.png"):
        assert str(tmp_path / place) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "/etc/passwd",
        "../a.png",
        "images/../../a.png",
        "a/..",
        "..\\a.png",
        "C:/a.png",
        "a\0.png",
        "a" * 300,
    ],
)
def test_names_that_could_lead_outside_are_refused(name, tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="expected a relative path"):
        resolve_image(name, [tmp_path / "images"])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    Image.new(mode, (5, 4)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.size == (5, 4)


def test_truncated_corrupt_and_foreign_files_are_refused(tmp_path):
    whole = picture(tmp_path / "a.png").read_bytes()
    jpeg = tmp_path / "a.jpg"
    Image.open(tmp_path / "a.png").save(jpeg)
    bad = {
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": jpeg.read_bytes()[:-200],
        "flipped.png": whole[:100] + b"xxxx" + whole[104:],
        "empty.png": b"",
        "text.png": b"<html>404</html>",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    }
    Image.new("RGB", (3, 3)).save(tmp_path / "other.pcx")  # Pillow reads it; we do not
    bad["other.pcx"] = (tmp_path / "other.pcx").read_bytes()
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not a readable image") as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(side, tmp_path):
    with pytest.raises(DataError, match=f"{MAX_PIXELS:,} pixels"):
        load_image(bomb(tmp_path / "bomb.png", side, side))


@pytest.mark.parametrize(("width", "height"), [(30_000, 1), (1, 80_000_000), (9_000, 8_000)])
def test_the_square_that_an_image_is_padded_to_counts(width, height, tmp_path):
    with pytest.raises(
        DataError, match=r"strip\.png: .*(padded to a square, which has more|is more) than 80,000,000 pixels"
    ):
        load_image(bomb(tmp_path / "strip.png", width, height))


def test_a_fifo_and_a_device_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", Path("/dev/zero")):
        with pytest.raises(DataError, match="not a regular file"):
            load_image(path)


def test_check_images_names_the_bad_ones_in_order(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", seed=i) for i in range(70)]
    paths[3].write_bytes(b"broken")
    paths[40].unlink()
    paths[69].write_bytes(paths[69].read_bytes()[:50])
    bad = check_images(iter(paths), workers=2, progress=False)
    assert [path for path, _ in bad] == [paths[3], paths[40], paths[69]]
    assert all("not a readable image" in problem and str(tmp_path) not in problem[:20] for _, problem in bad)


def test_check_images_remembers_what_was_good(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    paths[2].write_bytes(b"broken")
    cache = tmp_path / "cache"
    assert len(check_images(paths, workers=1, progress=False, cache=cache)) == 1
    assert cache.stat().st_size == 4 * 16
    cache.write_bytes(cache.read_bytes() + b"half")  # as a run killed while writing leaves it
    paths[4].write_bytes(b"broken since")

    seen = []
    monkeypatch.setattr("mslora_cr.data.images._bounded", lambda pool, chunks, limit: seen.extend(chunks) or iter([]))
    check_images(paths, workers=1, progress=False, cache=cache)
    assert [path for chunk in seen for _, path in chunk] == [paths[2], paths[4]]
    monkeypatch.undo()

    picture(paths[2])
    bad = check_images(paths, workers=1, progress=False, cache=cache)
    assert [path for path, _ in bad] == [paths[4]]
    assert cache.stat().st_size == 6 * 16
