"""The small base from scratch, on miniatures of its pictures' repositories: what is read, described, written."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.raw import RawData
from mslora_cr.models.llava_med import load
from mslora_cr.synthetic.atlas import REPOSITORIES, AtlasFile, _views, atlas_digest, atlas_files
from mslora_cr.synthetic.descriptors import FEATURES, ORIENTATIONS, cropped, describe_patches
from mslora_cr.synthetic.small import make_small_llava

CELLS = "10 10 0\n12 14 4\n60 10 4\n60 50 8\n"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clones of the three repositories, a few pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    places = [f"brain/Dataset/train/{name}/{name}.png" for name in ("glioma", "meningioma", "notumor", "pituitary")]
    places += ["brain/Dataset/test/glioma/unused.png", "chula/Dataset/1.jpg", "retina/DRIVE/test/images/01_test.tif"]
    for number, place in enumerate(places):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (80, 60), (20 * number, 30, 40))
        ImageDraw.Draw(picture).ellipse((10, 10, 30 + 4 * number, 40), fill=(200, 180, 20 * number))
        picture.save(path)
    (root / "chula" / "Label").mkdir()
    (root / "chula" / "Label" / "1.txt").write_text(CELLS)
    return root


@pytest.fixture
def stream(tmp_path: Path) -> list[str]:
    """Overrides of `open_small`: one task with one record, and a folder for the model."""
    task = tmp_path / "data" / "BUSI"
    task.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\nIs there a mass?"}, {"from": "gpt", "value": "malignant"}]
    (task / "train.json").write_text(json.dumps([{"id": "0", "image": "a.png", "conversations": turns}]))
    return ["tasks=[BUSI]", f"data.root={tmp_path / 'data'}", f"model.path={tmp_path / 'made' / 'llava_small'}"]


def atlas(root: Path, work: Path) -> list[AtlasFile]:
    with RawData([root], work) as raw:
        return atlas_files(raw)


def test_the_pictures_are_found_and_their_labels_read(pictures: Path, tmp_path: Path) -> None:
    files = atlas(pictures, tmp_path / "work")
    assert [(one.kind, one.label) for one in files] == [
        *(("MR", name) for name in ("glioma", "meningioma", "notumor", "pituitary")),
        ("smear", "1"),
        ("fundus", ""),
    ]
    views = list(_views(files[4]))
    assert [picture.size for picture, _ in views] == [(80, 60)] + [(40, 30)] * 4
    # Four cells in all; two on the left above, one target cell on the right above, one burr cell on the right below.
    assert [traits for _, traits in views] == [
        {"number": "few", "shapes": "4"},
        {"number": "few", "shapes": "4"},
        {"number": "few", "shapes": "4"},
        {"number": "few", "shapes": "plain"},
        {"number": "few", "shapes": "8"},
    ]
    before, broken = atlas_digest(files), pictures / "brain" / "Dataset" / "train" / "glioma" / "more.png"
    broken.write_bytes(b"no picture")
    changed = atlas(pictures, tmp_path / "work")
    assert atlas_digest(changed) != before
    with pytest.raises(DataError, match=r"more\.png: not a readable picture"):
        list(_views(changed[1]))
    broken.unlink()
    assert atlas_digest(atlas(pictures, tmp_path / "work")) == before


def test_what_is_missing_is_named_with_its_repository(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=REPOSITORIES["smear"]):
        atlas(pictures / "brain", tmp_path / "work")


def test_patches_are_described_by_gradients_colour_and_contrast() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) * torch.tensor([1.0, 2.0, 3.0])[None, :, None, None]
    found = describe_patches(ramp, patch=4)
    assert found.shape == (1, 4, FEATURES)
    # unfold puts the four quarters of a feature side by side: histogram bins, then three colours, then contrast.
    first = found[0, 0].view(FEATURES // 4, 4)
    # Grey grows by 2 a pixel to the right, so the central difference is 4, and 2 at the border, where it is cut.
    assert first[0].tolist() == [3.0, 4.0, 3.0, 4.0] and not first[1:ORIENTATIONS].any()
    assert first[ORIENTATIONS].tolist() == [0.5, 2.5, 0.5, 2.5]
    assert first[-1].tolist() == [1.0] * 4  # The variance of 0 and 2, and of 4 and 6.
    turned = describe_patches(ramp.transpose(2, 3), patch=4)[0, 0].view(FEATURES // 4, 4)
    assert turned[ORIENTATIONS // 2].tolist() == [3.0, 3.0, 4.0, 4.0] and math.isclose(float(turned[0].sum()), 0.0)


def test_crops_show_the_picture_turned_and_mirrored() -> None:
    torch.manual_seed(0)
    views = cropped(torch.full((64, 3, 8, 8), 2.0))
    # A picture of one colour stays one: gain and shift alone change it.
    assert views.shape == (64, 3, 8, 8) and float(views.flatten(2).std(2).max()) < 1e-6
    corner = torch.zeros(200, 3, 8, 8)
    corner[:, :, 0, 0] = 50.0
    brightest = cropped(corner).mean(1).flatten(1)
    seen = {int(place) for place, most in zip(brightest.argmax(1), brightest.amax(1), strict=True) if most > 20}
    assert {0, 7, 56, 63} <= seen


def test_a_small_base_is_made_loads_and_is_kept(
    pictures: Path,
    stream: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mslora_cr.synthetic.pretraining.ALBUM_SIZE", 6)
    for batch in ("TOWER_BATCH", "LANGUAGE_BATCH"):
        monkeypatch.setattr(f"mslora_cr.synthetic.small.{batch}", 3)
    config = load_config("open_small", stream)
    folder = make_small_llava(config, [pictures], tower_steps=2, language_steps=2, progress=False)
    base = load(folder, dtype=torch.float32)
    assert base.patches == 36 and base.model.config.vision_feature_layer == -2
    words = [base.tokenizer.encode(text) for text in ("malignant", "mass", "lump on the border")]
    assert max(map(len, words)) <= 8  # Pieces, not bytes.
    first = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    made = (folder / "config.json").stat().st_mtime_ns
    make_small_llava(config, [pictures], tower_steps=2, language_steps=2, progress=False)
    assert (folder / "config.json").stat().st_mtime_ns == made
    other = make_small_llava(
        load_config("open_small", [*stream, f"model.path={tmp_path / 'again' / 'llava_small'}"]),
        [pictures],
        tower_steps=2,
        language_steps=2,
        progress=False,
    )
    second = load(other, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match="named llava_small, not elsewhere"):
        make_small_llava(load_config("open_small", [*stream, "model.path=elsewhere"]), [pictures])
    assert main(["model", "make", "open_small", *stream, "--raw", str(tmp_path / "nothing")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
