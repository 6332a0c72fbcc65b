"""Which kernels training uses, and that the choice decides a bank only where it is not PyTorch's."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mistral import modeling_mistral

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.evaluation.summary import fingerprint_fields
from mslora_cr.models.kernels import use_kernels
from mslora_cr.models.layout import ModelError
from mslora_cr.models.llava_med import load
from mslora_cr.models.load import answering_kernels
from mslora_cr.utils import kernels
from tests.conftest import ConfigWriter


def test_what_auto_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, gpu, device, expected in [
        (True, True, "auto", "liger"),
        (True, True, "cuda", "liger"),
        (True, True, "cpu", "torch"),
        (True, False, "auto", "torch"),
        (False, True, "auto", "torch"),
    ]:
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name, found=package: found or None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=gpu: found)
        assert kernels.chosen_kernels("auto", device) == expected
    assert kernels.chosen_kernels("torch", "cuda") == "torch"


def test_only_ligers_kernels_are_in_a_digest(config_file: ConfigWriter) -> None:
    auto, torch_, liger = (load_config(config_file(), [f"model.kernels={name}"]) for name in ("auto", "torch", "liger"))
    assert auto.training_digest() == torch_.training_digest() != liger.training_digest()
    assert "kernels" not in auto.fingerprint_fields()["model"]
    assert liger.fingerprint_fields()["model"]["kernels"] == "liger"
    assert fingerprint_fields(auto) == fingerprint_fields(liger)  # as the device, they do not tell answers apart


def test_what_answers_are_computed_with(config_file: ConfigWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for setting, dtype, device, expected in [
        ("auto", "bfloat16", "cuda", "liger"),
        ("liger", "bfloat16", "cuda", "liger"),
        ("liger", "bfloat16", "cpu", "torch"),
        ("torch", "bfloat16", "cuda", "torch"),
        ("auto", "float32", "cuda", "torch"),
    ]:
        config = load_config(config_file(), [f"model.kernels={setting}", f"model.dtype={dtype}"])
        assert answering_kernels(config, device) == expected


def test_liger_without_a_gpu_is_refused(config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config_file()), "model.kernels=liger"]) == 1
    assert "model.kernels: liger needs a GPU; set it to auto, or to torch" in capsys.readouterr().err


def test_liger_gets_this_language_model_alone_and_no_loss(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own functions stand for themselves: its kernels run on a GPU alone."""
    given: dict[str, Any] = {}
    rotated: list[torch.Size] = []

    def apply_liger_kernel_to_mistral(**options: Any) -> None:
        given.update(options)
        for name in ("MistralRMSNorm", "MistralMLP"):
            setattr(modeling_mistral, name, None)

    def liger_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated.append(query.shape)
        return modeling_mistral.apply_rotary_pos_emb(query, key, cos, sin)

    library = ModuleType("liger_kernel.transformers")
    library.apply_liger_kernel_to_mistral = apply_liger_kernel_to_mistral  # type: ignore[attr-defined]
    library.liger_rotary_pos_emb = liger_rotary_pos_emb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    other, model = (load(tiny_model, dtype=torch.float32).model for _ in range(2))
    before = (modeling_mistral.MistralRMSNorm, modeling_mistral.MistralMLP)
    use_kernels(model, "liger")
    assert given.pop("model") is model.model.language_model
    assert given == {
        **dict.fromkeys(("rms_norm", "swiglu"), True),
        **dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False),
    }
    assert (modeling_mistral.MistralRMSNorm, modeling_mistral.MistralMLP) == before  # of models built later
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = other(input_ids=ids).logits
        assert not rotated
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert len(rotated) == len(model.model.language_model.layers)
    model.config.text_config.model_type = "llama"
    with pytest.raises(ModelError, match=r"model\.kernels: liger supports Mistral language models, and this is llama"):
        use_kernels(model, "liger")
