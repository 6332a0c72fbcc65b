"""Which kernels training uses, and that the choice decides a bank only where it is not PyTorch's."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.mistral import modeling_mistral

from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.evaluation.summary import fingerprint_fields
from mslora_cr.models.kernels import use_kernels, used_kernels
from mslora_cr.models.language import language_model
from mslora_cr.models.llava_med import load
from mslora_cr.models.load import answering_kernels, load_model
from mslora_cr.utils import kernels
from tests.conftest import ConfigWriter, first_in_make_test
from tests.helpers.families import FAMILIES, make
from tests.helpers.more_families import make_more


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


@pytest.fixture
def ligers_formulas(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The formulas of the library's functions stand for them, since its kernels run on a GPU alone; counts calls."""
    calls: Counter[str] = Counter()

    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        calls["RMSNorm"] += 1
        assert (offset, casting) in ((0.0, "llama"), (1.0, "gemma")) and not in_place
        return (torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps) * (offset + weight.float())).to(x.dtype)

    def gated(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
        def fused(gate: Tensor, up: Tensor) -> Tensor:
            calls["gated MLP"] += 1
            return cast(Tensor, ACT2FN[activation](gate) * up)

        return fused

    def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls["rotary positions"] += 1
        return modeling_mistral.apply_rotary_pos_emb(query, key, cos, sin)

    library = ModuleType("liger_kernel.transformers")
    library.functional = SimpleNamespace(  # type: ignore[attr-defined]
        liger_rms_norm=rms_norm,
        liger_swiglu=gated("silu"),
        liger_geglu=gated("gelu_pytorch_tanh"),
        liger_rope=rope,
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    return calls


EXPECTED = {  # of two layers: norms, MLPs, rotations
    "gemma3": (13, 2, 2),
    "qwen3_vl": (9, 2, 2),
    "gemma4": (16, 2, 0),
    "glm4v_moe": (5, 2, 2),
    "ernie4_5_vl_moe": (5, 2, 0),
    "paligemma": (5, 2, 2),
    **dict.fromkeys(("llava", "llava_next", "qwen2_5_vl", "internvl", "smolvlm", "idefics3", "ovis2"), (5, 2, 2)),
}


@pytest.mark.parametrize("family", first_in_make_test(*EXPECTED, first=2))
def test_liger_computes_what_a_models_modules_do(family: str, ligers_formulas: Counter[str], tmp_path: Path) -> None:
    (make if family in FAMILIES else make_more)(family, tmp_path)
    other, model = (load_model(tmp_path, dtype=torch.float32).model for _ in range(2))
    counts = use_kernels(model, "liger")
    assert (used_kernels(model), used_kernels(other)) == ("liger", "torch")
    assert tuple(counts[operation] for operation in ("RMSNorm", "gated MLP", "rotary positions")) == EXPECTED[family]
    ids, results = torch.randint(10, 100, (2, 7), generator=torch.Generator().manual_seed(0)), []
    for each in (other, model):
        assert not ligers_formulas, "only the model that was given is changed"
        embedded = each.get_input_embeddings()(ids).detach().requires_grad_()
        states = language_model(each)(inputs_embeds=embedded, use_cache=False).last_hidden_state
        (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
        results.append((states, embedded.grad))
    assert ligers_formulas == counts
    for ours, theirs in zip(*results, strict=True):
        # Gradients of up to 90 are sums that cancel, and round at the scale of the largest.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-6 * float(theirs.abs().max()))


def test_a_norm_of_another_formula_keeps_its_own(ligers_formulas: Counter[str], tiny_model: Path) -> None:
    model = load(tiny_model, dtype=torch.float32).model
    norm = model.model.language_model.norm
    norm.variance_epsilon = 1e-3
    shifted = type("ShiftedNorm", (type(norm),), {"forward": lambda self, x: x + self.weight})
    norm.__class__ = shifted
    layers = len(model.model.language_model.layers)
    assert use_kernels(model, "liger") == {"RMSNorm": 2 * layers, "gated MLP": layers, "rotary positions": layers}
    assert type(norm) is shifted
