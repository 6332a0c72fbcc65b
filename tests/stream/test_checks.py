"""What training says before the first step."""

import json
import logging

import pytest
from PIL import Image

from mslora_cr.config.load import load_config
from mslora_cr.data.records import TrainingRecords
from mslora_cr.stream.checks import warn_of_large_images


@pytest.mark.parametrize(("size", "warned"), [((2000, 1500), True), ((600, 400), False)])
def test_large_pictures_are_named_with_what_they_cost(size, warned, tmp_path, caplog):
    folder = tmp_path / "data" / "Skin"
    folder.mkdir(parents=True)
    Image.new("RGB", size).save(folder / "a.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Skin."}]
    (folder / "train.json").write_text(json.dumps([{"id": "0", "image": "a.jpg", "conversations": turns}] * 50))
    (tmp_path / "run.yaml").write_text(
        f"run: r\nmodel: {{path: none}}\ndata: {{root: {tmp_path}/data}}\n"
        "datasets: {Skin: {modality: dermatology, folder: Skin}}\n"
        "tasks: [{name: Skin, epochs: 1, batch_size: 1, learning_rate: 1e-3}]\n"
    )
    config = load_config(tmp_path / "run.yaml")
    with caplog.at_level(logging.WARNING):
        warn_of_large_images(config, {"Skin": TrainingRecords(folder / "train.json")})
    assert ("Skin: its pictures have 3.0 megapixels on average" in caplog.text) == warned
    cached = load_config(tmp_path / "run.yaml", [f"data.cache_image_features={tmp_path}/kept"])
    caplog.clear()
    warn_of_large_images(cached, {"Skin": TrainingRecords(folder / "train.json")})
    assert not caplog.text
