"""A base in 4 or 8 bits: bitsandbytes' kernels run on the CPU, too, so a whole run is trained and evaluated here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import mslora_cr
from mslora_cr.banks.bank import BankError
from mslora_cr.banks.io import load_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.data.images import load_image
from mslora_cr.models.language import beside_language, language_linears
from mslora_cr.models.llava_med import load
from tests.conftest import ConfigWriter, first_in_make_test
from tests.helpers.families import make

bitsandbytes = pytest.importorskip("bitsandbytes")

BITS = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}
LINEARS_PER_LAYER = 7


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_language_models_linear_layers_are_quantised(
    bits: str, dtype: torch.dtype, tiny_model: Path
) -> None:
    model = load(tiny_model, dtype=dtype, quantization=bits).model
    quantised = {name for name, module in model.named_modules() if isinstance(module, BITS[bits])}
    assert quantised == set(language_linears(model))
    assert len(quantised) == LINEARS_PER_LAYER * model.config.text_config.num_hidden_layers
    rest = {parameter.dtype for name, parameter in model.named_parameters() if name.rpartition(".")[0] not in quantised}
    assert rest == {dtype}
    stored = {"4bit": torch.uint8, "8bit": torch.int8}[bits]
    assert {linear.weight.dtype for linear in language_linears(model).values()} == {stored}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("bits", "least", "most"), [("4bit", 1e-2, 0.3), ("8bit", 1e-3, 0.03)])
def test_a_quantised_model_says_nearly_the_same(bits: str, least: float, most: float, tiny_model: Path) -> None:
    exact = logits(load(tiny_model, dtype=torch.float32).model)
    found = logits(load(tiny_model, dtype=torch.float32, quantization=bits).model)
    assert least < ((found - exact).norm() / exact.norm()).item() < most


@pytest.mark.parametrize("bits", BITS)
def test_transformers_layout_is_quantised_alike(bits: str, tiny_model: Path, tmp_path: Path) -> None:
    whole = load(tiny_model, dtype=torch.float32)
    whole.model.save_pretrained(tmp_path)
    whole.image_processor.save_pretrained(tmp_path)
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    both = [load(folder, dtype=torch.float32, quantization=bits).model for folder in (tiny_model, tmp_path)]
    assert torch.equal(logits(both[0]), logits(both[1]))


@pytest.mark.parametrize("bits", BITS)
def test_frozen_banks_add_to_a_quantised_base_what_they_add_to_any(
    bits: str, tiny_model: Path, trained_config: Path
) -> None:
    """The concatenated adapter runs in full precision beside the quantised layer: y = Q(W) x + sum of B A x."""
    banks = [load_bank(folder) for folder in sorted((trained_config.parent / "checkpoints/tiny/banks").iterdir())]
    base = load(tiny_model, dtype=torch.float32, quantization=bits).model
    without = logits(base)
    stack = BankStack(base, "concatenate")
    stack.set_frozen(banks)
    assert not torch.equal(logits(stack.model), without)
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = stack.model.get_submodule(f"base_model.model.{name}")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    update = sum(bank.scaling * bank.matrices[name][1] @ bank.matrices[name][0] for bank in banks)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ update.T, rtol=0, atol=1e-5)
    stack.set_frozen([])
    assert torch.equal(logits(stack.model), without)
    with pytest.raises(BankError, match=r"banks cannot be merged into a quantised base; set lora\.fold=concatenate"):
        BankStack(base, "merge").set_frozen(banks)


@pytest.mark.parametrize(("bits", "most"), [("4bit", 1e-6), ("8bit", 0.1)])
def test_a_banks_gradient_is_that_through_the_dequantised_base(
    bits: str, most: float, tiny_model: Path, trained_config: Path
) -> None:
    """8-bit layers also round what goes in, so theirs is near only."""
    start = load_bank(trained_config.parent / "checkpoints/tiny/banks/pathvqa")
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    gradients = []
    for dequantise in (False, True):
        base = load(tiny_model, dtype=torch.float32, quantization=bits).model
        stack = BankStack(base.dequantize() if dequantise else base, "concatenate")
        stack.add_trainable(start.rank, start.alpha, initial=start)
        stack.model.train()
        stack.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients.append(torch.cat([half.grad.flatten() for pair in stack.trainable().values() for half in pair]))
    ours, expected = gradients
    assert expected.norm() > 0
    assert (ours - expected).norm() / expected.norm() <= most


@pytest.mark.parametrize("bits", first_in_make_test(*BITS))
def test_a_stream_is_trained_and_evaluated(bits: str, config_file: ConfigWriter, tmp_path: Path) -> None:
    """Two tasks, so that a frozen bank takes part; checkpointing on, as in the published configurations."""
    config = config_file()
    options = [f"model.quantization={bits}", "tasks=[pathvqa,PCAM]", "tasks.*.epochs=1"]
    options += ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={use_reentrant: false}"]
    assert main(["train", str(config), *options]) == 0
    run = tmp_path / "checkpoints" / "tiny"
    assert load_config(run / "config.yaml").lora.fold == "concatenate"
    losses = [json.loads(line) for line in (run / "logs" / "PCAM.jsonl").read_text().splitlines()]
    assert losses and all(entry["contrastive"] > 0 and entry["orthogonality"] > 0 for entry in losses)
    for name in ("pathvqa", "PCAM"):
        bank = load_bank(run / "banks" / name)
        assert all(b.abs().sum() > 0 and a.dtype == torch.float32 for a, b in bank.matrices.values())
    assert main(["evaluate", str(config), *options]) == 0
    cells = json.loads((tmp_path / "results" / "tiny" / "evaluation.json").read_text())["cells"]
    assert [cell["banks"] for cell in cells] == [["pathvqa"], ["pathvqa", "PCAM"]]


# --- refused -------------------------------------------------------------------------------------------------------


def test_merging_is_refused_before_anything_is_loaded(config_file: ConfigWriter) -> None:
    assert load_config(config_file()).lora.fold == "merge"
    assert load_config(config_file(), ["model.quantization=8bit"]).lora.fold == "concatenate"
    with pytest.raises(ConfigError, match=r"lora\.fold: banks cannot be merged into a quantised base"):
        load_config(config_file(), ["model.quantization=4bit", "lora.fold=merge"])
    with pytest.raises(ConfigError, match=r"model\.quantization: should be '4bit' or '8bit'"):
        load_config(config_file(), ["model.quantization=2bit"])


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "internvl"])
def test_other_families_train_and_answer_in_4_bits_and_so_does_their_export(
    family: str, config_file: ConfigWriter, tmp_path: Path
) -> None:
    """The exported adapter over the exported base, which transformers loads in 4 bits again."""
    make(family, tmp_path / "model")
    settings = {"path": str(tmp_path / "model"), "dtype": "float32", "device": "cpu", "quantization": "4bit"}
    config = config_file(model=settings)
    assert main(["train", str(config), "tasks=[pathvqa,PCAM]", "tasks.*.epochs=1"]) == 0
    run = tmp_path / "checkpoints" / "tiny"
    model = mslora_cr.load(run, task="PCAM")
    linears = {name for name, module in model._base.model.named_modules() if isinstance(module, BITS["4bit"])}
    assert linears and linears == {name for name in linears if "language_model" in name}
    folder = Path(model.config.data.root) / "PCam"
    row = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    wanted = list(model.ask(folder / row["image"], row["text"]).ids)
    out = tmp_path / "out"
    assert main(["export", str(run), "--output", str(out), "--format", "peft", "--task", "PCAM"]) == 0
    assert json.loads((out / "PCAM" / "export.json").read_text())["trained_beside"] == "the base in 4bit"
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=beside_language(model._base.model),
    )
    base = transformers.AutoModelForImageTextToText.from_pretrained(
        out / "base", quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
    )
    elsewhere = PeftModel.from_pretrained(base, out / "PCAM").eval()
    processor = model._base.processor
    content = [{"type": "image", "image": load_image(folder / row["image"])}, {"type": "text", "text": row["text"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        ids = elsewhere.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == wanted


def test_zero_3_is_refused(
    config_file: ConfigWriter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    options = ["model.quantization=4bit", "training.deepspeed=configs/deepspeed/zero3.json"]
    assert main(["train", str(config_file()), *options]) == 1
    assert "ZeRO-3 cannot shard a quantised base" in capsys.readouterr().err


PROCESSOR_WITH_BFLOAT16 = """
import ctypes
found = ctypes.CDLL.__getattr__
ctypes.CDLL.__getattr__ = lambda self, name: (lambda: True) if name == "has_avx512bf16_cpu" else found(self, name)
"""
"""bitsandbytes then looks for an optional kernel, as it does on a processor with AVX-512 and bfloat16."""


@pytest.mark.parametrize(
    ("opening", "warns"),
    [
        pytest.param("", True, marks=pytest.mark.long, id="by itself"),
        pytest.param("import mslora_cr; mslora_cr.load", False, marks=pytest.mark.long, id="interface"),
        pytest.param("from mslora_cr.utils.logs import set_up; set_up()", False, marks=pytest.mark.long, id="commands"),
    ],
)
def test_an_optional_kernel_of_bitsandbytes_is_not_missed(opening: str, warns: bool) -> None:
    code = f"{PROCESSOR_WITH_BFLOAT16}{opening}\nimport bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("gemm_4bit_forward" in done.stderr) == warns, done.stderr


def test_without_bitsandbytes_the_extra_is_named(
    config_file: ConfigWriter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(["train", str(config_file()), "model.quantization=4bit"]) == 1
    assert "bitsandbytes is not installed; pip install 'mslora-cr[quantization]'" in capsys.readouterr().err
