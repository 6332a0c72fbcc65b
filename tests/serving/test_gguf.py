"""What `mslora-cr export --format gguf` writes is what llama.cpp reads, and llama.cpp answers from it as transformers does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from PIL import Image

from mslora_cr.banks.bank import sum_banks
from mslora_cr.banks.io import load_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.models.layout import ModelError
from mslora_cr.models.load import load_model
from mslora_cr.serving.export import write_gguf_base
from mslora_cr.serving.gguf_model import check_layout, write_lora
from mslora_cr.serving.gguf_projector import check_projector
from tests.helpers.any_family import make_any
from tests.helpers.families import TEXT, Shape, make, random_bank
from tests.serving.test_export import golden_questions, golden_run  # noqa: F401

READER = Path(__file__).parents[1] / "helpers" / "answers_in_llama_cpp.py"
OTHER = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
"""The interpreter that has llama-cpp-python."""
needs_llama_cpp = pytest.mark.skipif(
    subprocess.run([OTHER, "-c", "import llama_cpp"], capture_output=True, check=False).returncode != 0,
    reason="llama-cpp-python is not installed: pip install llama-cpp-python (it compiles llama.cpp), here or in an "
    "environment whose interpreter LLAMA_CPP_PYTHON names",
)


def in_llama_cpp(cases: list[dict[str, Any]], tmp_path: Path) -> list[Any]:
    asked, found = tmp_path / "cases.json", tmp_path / "found.json"
    asked.write_text(json.dumps(cases))
    done = subprocess.run([OTHER, "-P", str(READER), str(asked), str(found)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text())


def test_files_hold_the_models_numbers_under_llama_cpps_names(trained_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained_config), "--output", str(out), "--format", "gguf", "--task", "PCAM"]) == 0
    assert {str(file.relative_to(out)) for file in out.rglob("*.gguf")} == {
        "base/model.gguf",
        "base/mmproj.gguf",
        "PCAM/adapter.gguf",
    }
    text = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out / "base/model.gguf").tensors}
    adapter = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out / "PCAM/adapter.gguf").tensors}
    banks = trained_config.parent / "checkpoints/tiny/banks"
    whole = sum_banks([load_bank(banks / name) for name in ("pathvqa", "slake-vqarad", "PCAM")], "sum")
    assert len(adapter) == 2 * len(whole.matrices) and len(text) == 3 + 9 * 3
    # Row 2i of a head is row i of its first half, and row 2i + 1 that of its second: 4 heads of 32 rows.
    b = whole.matrices["model.language_model.layers.1.self_attn.q_proj"][1]
    for row, source in ((0, 0), (1, 16), (2, 1), (31, 31), (32, 32), (33, 48)):
        assert (adapter["blk.1.attn_q.weight.lora_b"][row] == b[source].numpy()).all()
    mlp = whole.matrices["model.language_model.layers.0.mlp.up_proj"]
    assert (adapter["blk.0.ffn_up.weight.lora_a"] == mlp[0].numpy()).all()
    tower = gguf.GGUFReader(out / "base/mmproj.gguf")
    assert tower.fields["clip.vision.block_count"].contents() == 3  # the last of four layers is not read
    assert not [tensor.name for tensor in tower.tensors if ".blk.3." in tensor.name or "post_ln" in tensor.name]


def test_other_layouts_are_refused_by_name(tmp_path: Path) -> None:
    make("gemma3", tmp_path / "gemma")
    with pytest.raises(ModelError, match="and this base is gemma3 with gemma3_text"):
        check_layout(load_model(tmp_path / "gemma", dtype=torch.float32).model)
    make("qwen2_5_vl", tmp_path / "qwen")
    with pytest.raises(ModelError, match="windows of another size than 112 pixels"):
        check_projector(load_model(tmp_path / "qwen", dtype=torch.float32).model)


@pytest.mark.long
@needs_llama_cpp
def test_llama_cpp_answers_the_golden_questions(golden_run: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "gguf"
    assert main(["export", str(golden_run), "--output", str(out), "--format", "gguf"]) == 0
    assert main(["export", str(golden_run), "--output", str(tmp_path / "merged"), "--format", "merged"]) == 0
    names, ends = ["pathvqa", "slake-vqarad", "derm", "PCAM"], [2]
    cases: list[dict[str, Any]] = []
    wanted = []
    for question in golden_questions()[::5]:
        task = names[question["banks"] - 1]
        model, processor = load_merged(tmp_path / "merged" / task)
        prompt = f"<s>[INST] {question['question']} [/INST]"
        files = {"model": str(out / "base/model.gguf"), "adapter": str(out / task / "adapter.gguf")}
        cases.append({**files, "prompt": prompt, "tokens": 12, "ends": ends})
        wanted.append(answered(model, processor, prompt))
    picture = tmp_path / "picture.png"  # of the tower's own size: llama.cpp scales others by code of its own
    Image.open(golden_questions()[0]["image"]).convert("RGB").resize((56, 56)).save(picture)
    cases.append({**files, "projector": str(out / "base/mmproj.gguf"), "image": str(picture)})
    *answers, features = in_llama_cpp(cases, tmp_path)
    assert answers == wanted
    pixels = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    orders = [image_features(model, pixels, class_first) for class_first in (True, False)]
    # llama.cpp builds before pull request 25844 put the class position behind the patches.
    assert min((torch.tensor(features) - order).norm() / order.norm() for order in orders) < 2e-3


@torch.inference_mode()
def image_features(model: Any, pixels: torch.Tensor, class_first: bool) -> torch.Tensor:
    """What the language model reads of a picture; or what it would read if the class position stood last."""
    tower = model.model.vision_tower
    parts = [tower.embeddings.class_embedding.expand(1, 1, -1)]
    parts.insert(int(class_first), tower.embeddings.patch_embedding(pixels).flatten(2).mT)
    hidden = tower.pre_layrnorm(torch.cat(parts, 1) + tower.embeddings.position_embedding.weight)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return model.model.multi_modal_projector(hidden[:, 1:])[0]


def load_merged(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def answered(model: Any, processor: Any, prompt: str) -> list[list[int]]:
    """The ids of a prompt, and those that transformers answers with."""
    inputs = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    start = inputs["input_ids"].shape[1]
    return [output[:start].tolist(), output[start:].tolist()]


@pytest.mark.long
@needs_llama_cpp
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_llama_cpp_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    folder, out = tmp_path / family, tmp_path / "out"
    if family == "qwen2_vl":
        make_any(family, folder)
    else:  # llama.cpp's M-RoPE gives NaN in heads of 8 numbers
        make(family, folder, Shape(text={**TEXT, "hidden_size": 64, "head_dim": 16}))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].pop("window_size", None)  # llama.cpp knows the published one alone
    (folder / "config.json").write_text(json.dumps(config))
    base = load_model(folder, dtype=torch.float32)
    out.mkdir()
    ends = base.processor.tokenizer.eos_token_id, base.model.generation_config.eos_token_id
    base.model.get_output_embeddings().weight.data.mul_(8)  # so that random weights prefer something
    bank = random_bank(base.model, 1, 0.05)
    write_gguf_base(base, out)
    write_lora(base.model, bank, out / "adapter.gguf")
    prompts = ["is this a cell?", "what does the  picture show: a nucleus or 12.5 µm lesions of the skin?"]
    cases, wanted = [], []
    for adapter in (None, str(out / "adapter.gguf")):
        if adapter:
            BankStack(base.model, "merge").set_frozen([bank])
        for prompt in prompts:
            cases.append(
                {"model": str(out / "model.gguf"), "adapter": adapter, "prompt": prompt, "tokens": 12, "ends": ends}
            )
            wanted.append(answered(base.model, base.processor, prompt))
    found = in_llama_cpp(cases, tmp_path)
    assert found == wanted
    assert len({tuple(answer) for _, answer in wanted}) == len(wanted), "the bank and the question change the answer"
