"""A base model split over devices answers as it does on one. Memory limits stand in for GPUs, and the CPU for each of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.banks.per_sample import PerSampleAdapters, whole_banks
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.generation.hf_decoder import PlainDecoder
from mslora_cr.generation.run import decoder_of
from mslora_cr.models.layout import ModelError
from mslora_cr.models.load import load_model
from mslora_cr.models.split import device_map, is_split, split_over_gpus
from tests.conftest import ConfigWriter
from tests.helpers.families import make, random_bank


@torch.inference_mode()
def scores(model: Any) -> torch.Tensor:
    ids = torch.tensor([[20, 50, 60, 70], [80, 90, 20, 30]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_merged_and_routed_banks_answer_as_on_one_device(tmp_path: Path) -> None:
    make("qwen2_5_vl", tmp_path / "model")
    one, split = (load_model(tmp_path / "model", dtype=torch.float32) for _ in range(2))
    banks = [random_bank(one.model, seed) for seed in (1, 2)]
    split_over_gpus(split.model, {"cpu": 1 << 30})
    assert is_split(split.model) and not is_split(one.model)
    adapters = PerSampleAdapters(split.model, banks)
    with adapters.answering(weights := whole_banks([[0], [0, 1]], 2)):
        adapters.set_rows(weights)
        routed = scores(split.model)
    adapters.remove()
    stacks = [BankStack(base.model, "merge", reuse=True) for base in (one, split)]
    for row, chosen in enumerate((banks[:1], banks)):
        for stack in stacks:
            stack.set_frozen(chosen)
        assert torch.equal(scores(one.model), scores(split.model))
        torch.testing.assert_close(routed[row], scores(one.model)[row], rtol=1e-4, atol=1e-4)
    assert isinstance(decoder_of(split.input_processor(2048, True), split.model, [], 4), PlainDecoder)


def test_layers_stay_whole_and_nothing_is_left_on_the_host(tmp_path: Path) -> None:
    make("gemma3", tmp_path / "model")
    model: Any = load_model(tmp_path / "model", dtype=torch.float32).model
    size = sum(parameter.nbytes for parameter in model.parameters())
    places = device_map(model, {0: int(0.7 * size), 1: size})
    assert set(places.values()) == {0, 1}
    for layer in range(2):
        on = {place for name, place in places.items() if f"language_model.layers.{layer}" in name}
        assert len(on) <= 1, "a layer is on one device"
    with pytest.raises(ModelError, match=r"and 1 GPUs can take 0\.0 GB, so (cpu|disk) would hold the rest"):
        device_map(model, {0: size // 2})


def test_training_refuses_it(config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config_file()), "model.device_map=auto"]) == 1
    assert "and train with training.deepspeed=zero3" in capsys.readouterr().err
