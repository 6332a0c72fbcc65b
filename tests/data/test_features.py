"""Cached features of the tower: the same as computed ones, keyed by content, whole or not there."""

import hashlib
import multiprocessing
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mslora_cr.data.features import FeatureCache, feature_key, flattened, together
from mslora_cr.data.records import DataError
from mslora_cr.models.llava_med import load
from mslora_cr.models.vision import detach_tower, tower_features


class Processor:
    """The settings of an image processor."""

    image_mean = (0.5, 0.5, 0.5)

    def to_dict(self) -> dict[str, Any]:
        return {"image_mean": self.image_mean}


def image(path: Path, value: int) -> Path:
    Image.new("RGB", (4, 4), (value, value, value)).save(path)
    return path


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def means(images: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"features": image.mean((1, 2))[:, None]} for image in images]


def fill(folder: Path, images: list[Path]) -> None:
    FeatureCache(folder).fill(images, pixels, means, progress=False)


def test_equal_images_are_seen_once_and_a_known_one_never_again(tmp_path: Path) -> None:
    first, other = image(tmp_path / "a.png", 10), image(tmp_path / "b.png", 20)
    copy = Path(shutil.copy(first, tmp_path / "c.png"))
    seen: list[int] = []

    def encode(images: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        seen.append(len(images))
        return means(images)

    cache = FeatureCache(tmp_path / "cache")
    cache.fill([first, other, copy], pixels, encode, progress=False)
    assert seen == [2]
    assert cache.load(copy)["features"].equal(torch.full((3, 1), 10.0))
    assert cache.load(other)["features"].equal(torch.full((3, 1), 20.0))
    cache.fill([first, other, copy], pixels, encode, progress=False)
    assert seen == [2]


def test_an_image_that_changes_has_no_features(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png", 10)
    fill(tmp_path / "cache", [path])
    image(path, 11)
    with pytest.raises(DataError, match="no features"):
        FeatureCache(tmp_path / "cache").load(path)


def test_an_image_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def file_digest(file: Any, kind: str) -> Any:
        hashed.append(Path(file.name).name)
        return original(file, kind)

    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    first, other = image(tmp_path / "a.png", 10), image(tmp_path / "b.png", 20)
    cache = FeatureCache(tmp_path / "cache")
    cache.fill([first, other], pixels, means, progress=False)
    for _ in range(3):
        cache.load(first)
        FeatureCache(tmp_path / "cache").load(other)
    assert hashed == ["a.png", "b.png"]

    content, status = other.read_bytes(), first.stat()
    assert len(content) == status.st_size
    first.write_bytes(content)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert cache.load(first)["features"].equal(cache.load(other)["features"])
    assert hashed == ["a.png", "b.png", "a.png"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png", 10)
    cache = FeatureCache(tmp_path / "cache")
    fill(cache.folder, [path])
    cache.path_of(path).write_bytes(cache.path_of(path).read_bytes()[:-4])
    with pytest.raises(DataError, match="remove that file"):
        cache.load(path)


def test_two_writers_leave_whole_files_and_nothing_else(tmp_path: Path) -> None:
    images = [image(tmp_path / f"{number}.png", number) for number in range(24)]
    context = multiprocessing.get_context("fork")  # a new process would import everything
    writers = [context.Process(target=fill, args=(tmp_path / "cache", images)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = FeatureCache(tmp_path / "cache")
    assert [float(cache.load(path)["features"][0]) for path in images] == list(map(float, range(24)))
    assert sum(file.is_file() for file in cache.folder.rglob("*")) == len(images)


def test_whoever_may_read_new_files_may_read_a_shared_cache(tmp_path: Path) -> None:
    path, cache = image(tmp_path / "a.png", 10), FeatureCache(tmp_path / "cache")
    before = os.umask(0o022)
    try:
        fill(cache.folder, [path])
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.path_of(path).stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "a.png", 10)

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        fill(tmp_path / "cache", [path])
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_the_key_follows_tower_layer_and_preprocessing() -> None:
    tower, processor, other = torch.nn.Linear(2, 2), Processor(), Processor()
    other.image_mean = (0.4, 0.5, 0.5)
    weights = tower.state_dict()
    keys = {feature_key(weights, -2, processor), feature_key(weights, -1, processor), feature_key(weights, -2, other)}
    keys.add(feature_key(torch.nn.Linear(2, 2).state_dict(), -2, processor))
    keys.add(feature_key(tower.bfloat16().state_dict(), -2, processor))
    assert len(keys) == 5


def test_a_model_takes_features_where_it_took_pixels(tiny_model: Path) -> None:
    base = load(tiny_model, dtype=torch.float32)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[base.image_token_id] * base.patches, 300, 301]] * 2)
    with torch.no_grad():
        expected = base.model(input_ids=ids, pixel_values=pixels).logits
        tower = detach_tower(base.model)
        features = tower_features(tower, base.model.config.vision_feature_layer, pixels)
        assert features.shape == (2, base.patches + 1, 96)
        assert base.model(input_ids=ids, pixel_values=features).logits.equal(expected)


def test_features_of_images_are_put_together_as_they_were_taken_apart() -> None:
    """A list with an entry an image, and features of layers: a list an image, one tensor, a list beside its layer."""
    one, other = torch.arange(6.0).view(3, 2), torch.arange(4.0).view(2, 2)
    outputs = [
        {
            "last_hidden_state": part,
            "pooler_output": (part,),
            "deepstack_features": [[part + 1], part + 2, (7, [part + 3])],
        }
        for part in (one, other)
    ]
    kept = [flattened(output) for output in outputs]
    assert list(kept[0]) == [
        "pooler_output.0", "deepstack_features.0.0", "deepstack_features.1",
        "deepstack_features.2.0", "deepstack_features.2.1.0",
    ]  # fmt: skip
    image = together(kept)["image"]
    assert [part.tolist() for part in image.pooler_output] == [one.tolist(), other.tolist()]
    by_image, joined, (layer, beside) = image.deepstack_features
    assert [part.tolist() for part in by_image] == [(one + 1).tolist(), (other + 1).tolist()]
    assert joined.equal(torch.cat([one, other]) + 2) and layer == 7 and beside[1].equal(other + 3)
    assert list(flattened({"last_hidden_state": one})) == ["last_hidden_state"]  # where nothing is pooled
    plain = together([{"pooler_output": one[None]}, {"pooler_output": one[None] + 1}])["image"]
    assert plain.pooler_output.equal(torch.stack([one, one + 1]))
    beside = [flattened({"pooler_output": (part,), "image_tokens": [part]}) for part in (one, one, other)]
    assert [part.tolist() for part in together(beside[:2])["image"].image_tokens] == [one.tolist()]
    with pytest.raises(ValueError, match="image_tokens differs among images"):
        together(beside)


def test_features_that_the_disk_cannot_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [image(tmp_path / f"{number}.png", number) for number in range(3)]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 3 * 12 - 1))  # 3 floats an image
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(DataError, match=r"take about 0\.0 GB, and 0\.0 GB are free; set data\.cache_image_features"):
        cache.fill(paths, pixels, means, writers=2, progress=False)
    cache.fill(paths, pixels, means, progress=False)
