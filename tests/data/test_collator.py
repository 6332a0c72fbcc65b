"""Records → samples → batches on the golden model: ids, labels, pixels, padding, and lists of images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mslora_cr.data import datasets
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.data.datasets import EvalDataset, TrainDataset
from mslora_cr.data.features import FeatureCache
from mslora_cr.data.llava_med_inputs import TOWER_FEATURES, LlavaMedInputs
from mslora_cr.data.prompts import IGNORE_INDEX, IMAGE_INDEX
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.models.llava_med import load
from tests.conftest import GOLDEN

PLACEHOLDER, PATCHES = 3, 16
PIXELS = load_file(GOLDEN / "pixel_values.safetensors")
SUPERVISED = json.loads((GOLDEN / "tokenization.json").read_text())["supervised"]


@pytest.fixture(scope="module")
def input_processor() -> LlavaMedInputs:
    base = load(GOLDEN / "llava_med_tiny", dtype=torch.float32)
    return LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)


@pytest.fixture
def samples(input_processor: LlavaMedInputs) -> TrainDataset:
    return TrainDataset(TrainingRecords(GOLDEN / "conversations.json"), [GOLDEN], input_processor)


def write(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(list(records)))
    return path


def conversation(image: Any, question: str = "<image>\nIs it?") -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": 1, "conversations": turns} | ({} if image is None else {"image": image})


def questions(folder: Path, *images: Any) -> TestRecords:
    path = folder / "test.jsonl"
    rows = [
        {
            "question_id": index,
            "image": image,
            "text": f"Is it? {'very ' * index}",
            "gt": "yes",
            "answer_type": "CLOSED",
        }
        for index, image in enumerate(images)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TestRecords(path)


def expanded(ids: list[int]) -> list[int]:
    return [token for each in ids for token in ([PLACEHOLDER] * PATCHES if each == IMAGE_INDEX else [each])]


# --- one sample ----------------------------------------------------------------------------------------------------


def test_every_sample_is_the_golden_one(samples: TrainDataset) -> None:
    assert len(samples) == len(SUPERVISED) == 24
    for index, golden in enumerate(SUPERVISED):
        sample, record = samples[index], samples.records[index]
        assert sample["index"] == index
        assert sample["input_ids"] == expanded(golden["input_ids"])
        labels = [
            label
            for token, each in zip(golden["input_ids"], golden["labels"], strict=True)
            for label in ([IGNORE_INDEX] * PATCHES if token == IMAGE_INDEX else [each])
        ]
        assert sample["labels"] == labels
        assert sample["pixel_values"].shape == (len(record.images), 3, 56, 56)
        for name, pixels in zip(record.images, sample["pixel_values"], strict=True):
            expected = PIXELS[Path(name).name if Path(name).name in PIXELS else Path(name).stem]
            assert (pixels - expected.squeeze()).abs().max() <= 1e-5


def test_a_list_of_images_shows_its_first_as_published(input_processor: LlavaMedInputs, tmp_path: Path) -> None:
    names = ["images/wide.png", "images/tall.png"]
    alone = TrainDataset(TrainingRecords(write(tmp_path, conversation(names[0]))), [GOLDEN], input_processor)[0]
    (tmp_path / "list").mkdir()
    listed = TrainingRecords(write(tmp_path / "list", conversation(names)))
    first = TrainDataset(listed, [GOLDEN], input_processor)[0]
    assert first["input_ids"] == alone["input_ids"]
    assert torch.equal(first["pixel_values"], alone["pixel_values"])

    every = TrainDataset(listed, [GOLDEN], replace(input_processor, all_images=True))[0]
    assert every["input_ids"].count(PLACEHOLDER) == 2 * PATCHES
    assert every["pixel_values"].shape[0] == 2
    assert torch.equal(every["pixel_values"][:1], alone["pixel_values"])
    assert not torch.equal(every["pixel_values"][1], every["pixel_values"][0])
    assert len(every["labels"]) == len(every["input_ids"])


def test_a_question_shows_the_first_image_or_all(input_processor: LlavaMedInputs, tmp_path: Path) -> None:
    records = questions(tmp_path, ["images/wide.png", "images/tall.png"])
    for everything, count in ((False, 1), (True, 2)):
        asked = EvalDataset(records, [GOLDEN], replace(input_processor, all_images=everything))
        [prompt] = asked.prompts()
        assert prompt.opening.count(PLACEHOLDER) == count * PATCHES
        assert prompt.opening[-1] == PLACEHOLDER and PLACEHOLDER not in prompt.rest
        assert [image.name for image in prompt.images] == ["wide.png", "tall.png"][:count]
        assert asked.load_images(0).shape == (count, 3, 56, 56)


def test_errors_name_the_file_and_the_record(input_processor: LlavaMedInputs, tmp_path: Path) -> None:
    path = write(tmp_path, conversation("images/wide.png"), conversation("images/none.png"))
    broken = TrainDataset(TrainingRecords(path), [GOLDEN], input_processor)
    with pytest.raises(DataError, match=r"train\.json: record 1: image 'images/none\.png' is missing"):
        broken[1]
    short = TrainDataset(TrainingRecords(path), [GOLDEN], replace(input_processor, max_length=10))
    with pytest.raises(DataError, match=r"train\.json: record 0: an image ends at position"):
        short[0]
    asked = EvalDataset(questions(tmp_path, "images/wide.png"), [GOLDEN], replace(input_processor, max_length=10))
    with pytest.raises(DataError, match=r"test\.jsonl: line 1: an image ends at position"):
        asked.prompts()
    asked = EvalDataset(questions(tmp_path, "images/none.png"), [GOLDEN], input_processor)
    with pytest.raises(DataError, match=r"test\.jsonl: line 1: image 'images/none\.png' is missing"):
        asked.prompts()


# --- batches -------------------------------------------------------------------------------------------------------


def test_training_batches_are_padded_at_their_end(samples: TrainDataset) -> None:
    text_only = next(index for index, record in enumerate(samples.records) if not record.images)
    chosen = [0, text_only, 5]
    batch = TrainingCollator(pad_token_id=0)([samples[index] for index in chosen])
    length = max(len(samples[index]["input_ids"]) for index in chosen)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (3, length),
        "labels": (3, length),
        "attention_mask": (3, length),
        "record_index": (3,),
        "pixel_values": (2, 3, 56, 56),
    }
    assert batch["record_index"].tolist() == chosen
    for row, index in enumerate(chosen):
        ids, labels = samples[index]["input_ids"], samples[index]["labels"]
        padding = length - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [0] * padding
        assert batch["labels"][row].tolist() == labels + [IGNORE_INDEX] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding
    assert torch.equal(batch["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[5]["pixel_values"]]))


def test_a_batch_without_images_has_no_pixels(samples: TrainDataset) -> None:
    text_only = next(index for index, record in enumerate(samples.records) if not record.images)
    assert "pixel_values" not in TrainingCollator(0)([samples[text_only]])


def test_text_only_samples_are_batched_with_cached_features(input_processor: LlavaMedInputs, tmp_path: Path) -> None:
    """Features have another shape than pixels, of which a text-only sample has none."""
    path = write(tmp_path, conversation("images/wide.png"), conversation(None, "Is it?"))
    cache = FeatureCache(tmp_path / "features")
    cache.fill([GOLDEN / "images/wide.png"], lambda image: None, lambda images: [{TOWER_FEATURES: torch.ones(5, 7)}])
    cached = TrainDataset(TrainingRecords(path), [GOLDEN], replace(input_processor, features=cache))
    for order in ([0, 1], [1, 0]):
        assert TrainingCollator(0)([cached[index] for index in order])["pixel_values"].equal(torch.ones(1, 5, 7))
    assert "pixel_values" not in TrainingCollator(0)([cached[1]])


def test_a_small_data_set_is_decoded_once(
    input_processor: LlavaMedInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    for name, size in (("a.png", (30, 40)), ("b.png", (50, 20))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / name)
        images.append(name)
    records = TrainingRecords(write(tmp_path, *map(conversation, images)))
    for cache_bytes in (datasets.KEPT_BYTES, 40_000):  # two samples have 37,632 bytes of pixels each
        monkeypatch.setattr(datasets, "KEPT_BYTES", cache_bytes)
        samples = TrainDataset(records, [tmp_path], input_processor)
        first = [samples[index]["pixel_values"].clone() for index in range(2)]
        (tmp_path / "a.png").rename(tmp_path / "away.png")
        if cache_bytes > 40_000:
            assert all(torch.equal(samples[index]["pixel_values"], first[index]) for index in range(2))
        else:
            with pytest.raises(DataError, match=r"a\.png' is missing"):
                samples[0]
        (tmp_path / "away.png").rename(tmp_path / "a.png")
