"""Writes a base model's vision tower and projector as llama.cpp's `mmproj` file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.language import PROJECTOR
from mslora_cr.models.layout import ModelError
from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.serving.gguf_model import write_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

_QWEN_EPS, _QWEN_IMAGE, _QWEN_WINDOW = 1e-6, 560, 112
"""Qwen's norms have this epsilon in transformers' code; llama.cpp warms up with this image side, and has this window
of Qwen2.5-VL's tower in its code, all in pixels but the first."""
_LINEARS = {"linear_1": "mm.0", "linear_2": "mm.2"}


def check_projector(model: Any) -> None:
    """Refuse a tower that llama.cpp would read otherwise than transformers.

    Raises:
        ModelError: What differs.
    """
    config, vision = model.config, model.config.vision_config
    if config.model_type == "llava":
        wrong = {
            f"a tower of type {vision.model_type}": vision.model_type != "clip_vision_model",
            "features of several layers": not isinstance(config.vision_feature_layer, int),
            "features with the class position": config.vision_feature_select_strategy != "default",
            f"a projector with {config.projector_hidden_act}": config.projector_hidden_act != "gelu",
            f"a tower with {vision.hidden_act}": vision.hidden_act not in ("quick_gelu", "gelu"),
        }
    else:
        whole = list(getattr(vision, "fullatt_block_indexes", []))
        regular = whole == [(whole[0] + 1) * (number + 1) - 1 for number in range(len(whole))] if whole else True
        wrong = {
            "patches of another number of frames than 2": vision.temporal_patch_size != 2,
            "windows of another size than 112 pixels": getattr(vision, "window_size", _QWEN_WINDOW) != _QWEN_WINDOW,
            "layers of whole attention at irregular places": not regular,
        }
    if found := [what for what, differs in wrong.items() if differs]:
        raise ModelError(f"llama.cpp does not read {', '.join(found)}; export with --format merged")


def write_projector(base: BaseModel, projector: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Write tower and projector.

    Args:
        projector: Parameters that a bank trained, by their names in the projector; they replace the model's own.
    """
    from gguf import GGUFType, GGUFWriter

    model: Any = base.model
    images = base.image_processor if isinstance(base, LlavaMed) else base.processor.image_processor  # type: ignore[attr-defined]
    writer = GGUFWriter(path, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(model.config.get_text_config().hidden_size)
    writer.add_vision_image_mean(images.image_mean)
    writer.add_vision_image_std(images.image_std)
    writer.add_vision_patch_size(model.config.vision_config.patch_size)
    if model.config.model_type == "llava":
        layer = _describe_clip(writer, model.config)
        write_tensors(writer, lambda: _clip_tensors(model, layer, projector))
    else:
        _describe_qwen(writer, model.config)
        write_tensors(writer, lambda: _qwen_tensors(model))


def _describe_clip(writer: GGUFWriter, config: Any) -> int:
    """Describe the tower up to the layer whose output the projector reads; return its number from 1."""
    vision, layer = config.vision_config, config.vision_feature_layer
    layer = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")
    writer.add_vision_block_count(layer)
    writer.add_array("clip.vision.feature_layer", [layer])
    return layer


def _clip_tensors(model: Any, layers: int, projector: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    names = _names(layers)
    for name, tensor in model.model.vision_tower.state_dict().items():
        # Layers behind the one that is read, and the norm behind the last one, are left out: llama.cpp would use them.
        if (found := names.get_name(f"vision_tower.vision_model.{name}", (".weight", ".bias"))) is None:
            continue
        if not found.startswith("v.post_ln"):
            yield found, tensor.float() if "_embd" in found else tensor
    own = dict(getattr(model.model, PROJECTOR).state_dict())
    for name, tensor in {**own, **projector}.items():
        linear, _, part = name.rpartition(".")
        yield f"{_LINEARS[linear]}.{part}", tensor.to(own[name].dtype)


def _describe_qwen(writer: GGUFWriter, config: Any) -> None:
    from gguf import VisionProjectorType

    vision, second = config.vision_config, config.model_type == "qwen2_vl"
    width = vision.embed_dim if second else vision.hidden_size
    writer.add_clip_projector_type(VisionProjectorType.QWEN2VL if second else VisionProjectorType.QWEN25VL)
    writer.add_vision_image_size(_QWEN_IMAGE)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(int(width * vision.mlp_ratio) if second else vision.intermediate_size)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    writer.add_vision_attention_layernorm_eps(_QWEN_EPS)
    if not second:
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision.fullatt_block_indexes[0] + 1)


def _qwen_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    names = _names(model.config.vision_config.depth)
    for name, tensor in model.model.visual.state_dict().items():
        if name == "patch_embed.proj.weight":  # Its two frames are two convolutions.
            yield "v.patch_embd.weight", tensor[:, :, 0].float()
            yield "v.patch_embd.weight.1", tensor[:, :, 1].float()
            continue
        parts = {name: tensor}
        if ".qkv." in name:
            parts = {name.replace("qkv", part): third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
        for part, numbers in parts.items():
            found = names.get_name(f"visual.{part}", (".weight", ".bias"))
            if found is None:
                raise ModelError(f"llama.cpp has no tensor for visual.{part}")
            yield found, numbers


def _names(layers: int) -> Any:
    import gguf

    # The map numbers Qwen's merger, whose last number is 2, like layers.
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(layers, 3))
