import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mslora_cr.cli.main import main
from mslora_cr.data.images import load_image, preprocess
from mslora_cr.data.lengths import read_limit
from mslora_cr.models import digest as digest_module
from mslora_cr.models.digest import weights_digest
from mslora_cr.models.layout import ModelError, linear_name, published_linear_name
from mslora_cr.models.llava_med import load
from mslora_cr.models.shapes import language_linear_shapes
from tests.conftest import GOLDEN

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden base model, to be spoiled; its tower stands beside it."""
    for name in ("llava_med_tiny", "clip-tiny-patch14"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path / "llava_med_tiny"


def stored() -> dict[str, torch.Tensor]:
    return {name: tensor for shard in SHARDS for name, tensor in load_file(GOLDEN / "llava_med_tiny" / shard).items()}


def edit_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))


def edit_shard(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], shard: str = SHARDS[0]) -> None:
    tensors = load_file(folder / shard)
    edit(tensors)
    save_file(tensors, folder / shard, {"format": "pt"})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 50, 60, 70]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return model(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits.float()


# --- both layouts --------------------------------------------------------------------------------------------------


def test_every_weight_of_the_shards_arrives_under_its_name() -> None:
    base = load(GOLDEN / "llava_med_tiny", dtype=torch.float32)
    state = base.model.state_dict()
    ours = {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.2.mlp.down_proj.weight": "model.language_model.layers.2.mlp.down_proj.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
        "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for theirs, name in ours.items():
        assert torch.equal(state[name], stored()[theirs].float())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert state["lm_head.weight"].shape[0] == 32000  # a row more would change every loss
    assert base.image_token_id == 3 and base.patches == 16


def test_the_named_tower_is_used_unless_the_shards_own_is_asked_for(copy: Path) -> None:
    name = "model.vision_tower.post_layernorm.weight"
    named = load_file(GOLDEN / "clip-tiny-patch14" / "model.safetensors")
    weight = stored()["model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"].float()
    other = named["vision_model.encoder.layers.0.mlp.fc1.weight"].float()
    assert not torch.equal(weight, other)
    key = next(key for key in load(copy).model.state_dict() if key.endswith("encoder.layers.0.mlp.fc1.weight"))
    assert torch.equal(load(copy, dtype=torch.float32).model.state_dict()[key], other)
    assert torch.equal(load(copy, "checkpoint", dtype=torch.float32).model.state_dict()[key], weight)
    assert name in load(copy).model.state_dict()


@pytest.mark.parametrize(
    "spelling", ["absolute", "relative to the config", "relative to here", "beside a linked model", "given"]
)
def test_where_the_tower_may_stand(spelling: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load(copy, dtype=torch.float32).model)
    tower = (copy.parent / "clip-tiny-patch14").rename(copy.parent / "towers")
    monkeypatch.chdir(copy.parent)
    if spelling == "beside a linked model":  # what scripts/link_assets.sh makes, with LLaVA-Med's own name of the tower
        links = copy.parent / "pretrained_models"
        (links / "openai").mkdir(parents=True)
        (links / "llava_med_v1.5").symlink_to(copy)
        (links / "openai" / "clip-vit-large-patch14-336").symlink_to(tower)
        edit_config(copy, mm_vision_tower="openai/clip-vit-large-patch14-336")
        found = load(links / "llava_med_v1.5", dtype=torch.float32)
    elif spelling == "given":
        found = load(copy, vision_tower=str(tower), dtype=torch.float32)
    else:
        names = {"absolute": str(tower), "relative to the config": "../towers", "relative to here": "towers"}
        edit_config(copy, mm_vision_tower=names[spelling])
        found = load(copy, dtype=torch.float32)
    assert torch.equal(logits(found.model), expected)


@pytest.fixture
def transformers_layout(copy: Path, tmp_path: Path) -> Path:
    """The same model as transformers itself would store it."""
    base = load(copy, dtype=torch.float32)
    folder = tmp_path / "transformers"
    base.model.save_pretrained(folder)
    base.image_processor.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(copy / name, folder)
    return folder


def test_transformers_layout_loads_as_the_same_model(copy: Path, transformers_layout: Path) -> None:
    one, other = load(copy, dtype=torch.float32), load(transformers_layout, dtype=torch.float32)
    assert torch.equal(logits(one.model), logits(other.model))
    assert (one.image_token_id, one.patches) == (other.image_token_id, other.patches)
    assert one.tokenizer.encode("two  spaces") == other.tokenizer.encode("two  spaces")
    assert language_linear_shapes(copy) == language_linear_shapes(transformers_layout)


def test_shapes_of_the_adapted_layers_without_loading_a_weight(copy: Path) -> None:
    for shard in SHARDS:
        (copy / shard).unlink()
    weights = LlavaForConditionalGeneration.state_dict(load(GOLDEN / "llava_med_tiny").model)
    linears = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in weights.items()
        if "language_model.layers" in name and "proj" in name
    }
    assert language_linear_shapes(copy) == linears


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_attention_are_choices(dtype: torch.dtype) -> None:
    for attention in ("eager", "sdpa"):
        model = load(GOLDEN / "llava_med_tiny", dtype=dtype, attn_implementation=attention).model
        assert {tensor.dtype for tensor in model.parameters()} == {dtype}
        assert model.config.text_config._attn_implementation == attention
        assert logits(model).isfinite().all()


def test_names_of_linear_layers_there_and_back() -> None:
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj"):
        ours = linear_name(name)
        assert ours is not None and published_linear_name(ours) == name
    assert linear_name("lm_head") is None
    assert linear_name("model.layers.0.input_layernorm.weight") is None


def test_a_tower_in_clips_own_layout(copy: Path) -> None:
    """CLIP's repository holds text and vision model together, as a pickle, with settings of long ago, most of them 0."""
    expected = logits(load(copy, dtype=torch.float32).model)
    file = copy.parent / "clip-tiny-patch14" / "config.json"
    vision = {key: value for key, value in json.loads(file.read_text()).items() if key != "architectures"}
    old = {
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "chunk_size_feed_forward": 0,
        "pruned_heads": {},
    }
    old |= {"cross_attention_hidden_size": None, "num_beams": 1, "temperature": 1.0}
    text = {"model_type": "clip_text_model", "hidden_size": 48, "vocab_size": 49408, **old}
    clip = {"model_type": "clip", "projection_dim": 768, "logit_scale_init_value": 2.6592}
    file.write_text(json.dumps({**clip, "text_config": text, "vision_config": {**vision, **old}}))
    weights = load_file(file.with_name("model.safetensors"))
    weights |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(48)}
    weights |= {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save(weights, file.with_name("pytorch_model.bin"))
    file.with_name("model.safetensors").unlink()
    settings = json.loads(file.with_name("preprocessor_config.json").read_text())
    keys = ("do_center_crop", "do_normalize", "do_resize", "image_mean", "image_std", "resample")
    plain = {key: settings[key] for key in keys} | {"crop_size": 56, "size": 56}
    plain |= {"feature_extractor_type": "CLIPFeatureExtractor"}
    file.with_name("preprocessor_config.json").write_text(json.dumps(plain))
    found = load(copy, dtype=torch.float32)
    assert torch.equal(logits(found.model), expected)
    pixels = preprocess(load_image(GOLDEN / "images" / "wide.png"), found.image_processor)
    golden = load_file(GOLDEN / "pixel_values.safetensors")
    assert (
        pixels - next(tensor for name, tensor in golden.items() if "wide" in name and "gray" not in name)
    ).abs().max() < 1e-5
    assert found.image_processor.crop_size["height"] == 56
    assert read_limit(copy, 2048).patches == 16


# --- which weights these are ---------------------------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    """Change one byte of a file where it stands."""
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))


def train_further(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor * 1.03 for name, tensor in tensors.items()}, file, {"format": "pt"})


def test_the_digest_is_of_what_is_loaded_not_of_where_it_stands(copy: Path, tmp_path: Path) -> None:
    digest = weights_digest(copy)
    assert len(digest) == 64 and digest == weights_digest(GOLDEN / "llava_med_tiny")
    (copy / "README.md").write_text("a note")
    (copy.parent / "clip-tiny-patch14" / "flax_model.msgpack").write_bytes(b"weights of another framework")
    assert weights_digest(copy) == digest
    assert weights_digest(copy, str((copy.parent / "clip-tiny-patch14").rename(tmp_path / "tower"))) == digest


@pytest.mark.parametrize(
    "file",
    [
        *(f"llava_med_tiny/{name}" for name in (*SHARDS, "model.safetensors.index.json", "tokenizer.model")),
        "llava_med_tiny/tokenizer_config.json",
        *(f"clip-tiny-patch14/{name}" for name in ("model.safetensors", "config.json", "preprocessor_config.json")),
    ],
)
def test_the_digest_changes_with_every_file_that_matters(file: str, copy: Path) -> None:
    digest, place = weights_digest(copy), copy.parent / file
    content = place.read_bytes()
    if place.suffix == ".json":
        place.write_bytes(content + b"\n")
    else:
        flip(place, len(content) // 2)
    assert weights_digest(copy) != digest
    place.write_bytes(content)
    assert weights_digest(copy) == digest


def test_the_digest_changes_with_the_configuration_and_with_shards_replaced_in_place(copy: Path) -> None:
    digests = {weights_digest(copy)}
    for shard in SHARDS:
        size = (copy / shard).stat().st_size
        train_further(copy / shard)
        assert (copy / shard).stat().st_size == size
        digests.add(weights_digest(copy))
    edit_config(copy, rms_norm_eps=1e-6)
    digests.add(weights_digest(copy))
    assert len(digests) == 4


def test_the_digest_of_a_model_with_the_shards_own_tower(copy: Path) -> None:
    tower = copy.parent / "clip-tiny-patch14"
    digest = weights_digest(copy, "checkpoint")
    assert digest != weights_digest(copy)
    (tower / "model.safetensors").unlink()
    assert weights_digest(copy, "checkpoint") == digest
    with pytest.raises(ModelError, match="clip-tiny-patch14: contains no weights"):
        weights_digest(copy)
    (tower / "preprocessor_config.json").write_text("{}")
    assert weights_digest(copy, "checkpoint") != digest


def test_the_digest_takes_a_tower_on_the_hub_by_its_name(copy: Path) -> None:
    assert weights_digest(copy, "openai/some-clip") != weights_digest(copy, "openai/another-clip")


def test_the_digest_of_transformers_layout_and_of_pickles(transformers_layout: Path) -> None:
    digests = {weights_digest(transformers_layout)}
    train_further(transformers_layout / "model.safetensors")
    digests.add(weights_digest(transformers_layout))
    (transformers_layout / "model.safetensors").rename(transformers_layout / "pytorch_model.bin")  # not opened as one
    digests.add(weights_digest(transformers_layout))
    flip(transformers_layout / "pytorch_model.bin", 5000)
    digests.add(weights_digest(transformers_layout))
    assert len(digests) == 4


def test_what_the_digest_notices_of_a_large_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WHOLE_BYTES": 20_000, "END_BYTES": 1_000, "BLOCK_BYTES": 64}.items():
        monkeypatch.setattr(digest_module, name, value)
    shard, digest = copy / SHARDS[0], weights_digest(copy)
    size, header = shard.stat().st_size, 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    assert header > 1_000
    for position in (header - 40, size // 17 + 10, size - 500):  # in the header, in a block, at the end
        flip(shard, position)
        assert weights_digest(copy) != digest
        flip(shard, position)
    flip(shard, size // 17 + 200)  # between two blocks
    assert weights_digest(copy) == digest
    train_further(shard)
    assert weights_digest(copy) != digest


def test_the_digest_reads_little_of_a_large_file(copy: Path) -> None:
    """To read all of it would take minutes."""
    digests = set()
    for length in (4_000, 2**63):  # the second is no header's
        with (copy / SHARDS[0]).open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(200 << 30)  # takes no space on the disk
        digests.add(weights_digest(copy))
    assert len(digests) == 2


@pytest.mark.parametrize("spoiled", [SHARDS[1], "config.json"])
def test_no_digest_of_half_a_model(spoiled: str, copy: Path) -> None:
    (copy / spoiled).unlink()
    with pytest.raises(ModelError, match="missing"):
        weights_digest(copy)


# --- refused -------------------------------------------------------------------------------------------------------


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(path, **options)
    return str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "none: no such folder; set model.path" in refusal(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "config.json is missing"),
        (SHARDS[1], f"missing {SHARDS[1]}, which model.safetensors.index.json names"),
        ("model.safetensors.index.json", "neither model.safetensors.index.json nor model.safetensors"),
        ("tokenizer.model", "neither tokenizer.model nor tokenizer.json exists"),
    ],
)
def test_a_missing_file_is_named(file: str, message: str, copy: Path) -> None:
    (copy / file).unlink()
    assert message in refusal(copy)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_of_the_tower_is_named(file: str, copy: Path) -> None:
    (copy.parent / "clip-tiny-patch14" / file).unlink()
    message = refusal(copy)
    assert "clip-tiny-patch14" in message and file.partition(".")[0] in message


def test_a_tower_that_is_not_there_is_named(copy: Path) -> None:
    shutil.rmtree(copy.parent / "clip-tiny-patch14")
    message = refusal(copy)
    assert "mm_vision_tower is '../clip-tiny-patch14'" in message and "model.vision_tower" in message


def test_a_missing_preprocessor_of_the_tower_is_named(copy: Path) -> None:
    (copy.parent / "clip-tiny-patch14" / "preprocessor_config.json").unlink()
    assert "no image processor configuration" in refusal(copy)


def test_missing_and_unexpected_weights_are_named(copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.z_proj.weight"] = torch.ones(2)

    edit_shard(copy, spoil)
    message = refusal(copy)
    assert "missing: model.language_model.layers.0.self_attn.q_proj.weight" in message
    assert "unexpected: model.layers.0.self_attn.z_proj.weight" in message


def test_a_weight_of_another_shape_is_named(copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(7, 24)

    edit_shard(copy, spoil)
    assert "model.layers.0.self_attn.q_proj.weight [7, 24] instead of [24, 24]" in refusal(copy)


def test_a_cut_shard_is_named(copy: Path) -> None:
    data = (copy / SHARDS[0]).read_bytes()
    (copy / SHARDS[0]).write_bytes(data[: len(data) // 2])
    assert f"{SHARDS[0]}: not a complete safetensors file" in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type is 'llama'; expected llava_mistral, or an image-text model that transformers knows",
        ),
        ({"rope_theta": "DROP", "vocab_size": "DROP"}, "missing vocab_size, rope_theta"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_vision_tower": "DROP"}, "mm_vision_tower is missing"),
        ({"num_hidden_layers": 4}, "missing: model.language_model.layers.3."),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, copy: Path) -> None:
    edit_config(copy, **changes)
    assert message in refusal(copy)


@pytest.mark.parametrize("content", ["", "[]", "{", '"llava"'])
def test_a_damaged_configuration_is_refused(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    assert "config.json" in refusal(copy)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {"x": "../../elsewhere.safetensors"}}', "{"])
def test_a_damaged_index_is_refused(content: str, copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    message = refusal(copy)
    assert "model.safetensors.index.json" in message or "elsewhere" in message


def test_transformers_layout_with_differences_is_refused(transformers_layout: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight")))

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))] = torch.ones(3, 24)

    edit_shard(transformers_layout, drop, "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in refusal(transformers_layout)
    edit_shard(transformers_layout, reshape, "model.safetensors")
    assert "layers.1.mlp.up_proj.weight" in refusal(transformers_layout)
    (transformers_layout / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(transformers_layout)


def test_a_tower_for_transformers_layout_is_refused(transformers_layout: Path, copy: Path) -> None:
    """That layout holds its tower; another one would silently be without effect."""
    message = refusal(transformers_layout, vision_tower=str(copy.parent / "clip-tiny-patch14"))
    assert "vision_tower" in message


def test_train_names_what_is_wrong_with_the_model(
    copy: Path, config_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / SHARDS[1]).unlink()
    assert main(["train", str(config_file()), f"model.path={copy}"]) == 1
    assert f"missing {SHARDS[1]}" in capsys.readouterr().err
