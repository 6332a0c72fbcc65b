"""Tiny random models of any type that `AutoModelForImageTextToText` maps, made from its configuration class.

`make_any(kind, folder)` shrinks the default configuration, widths and depths and numbers of experts, and keeps the geometry
of images, so that the default image processor fits. Its tokenizer has the tokens that the processor's source names, and its
chat template writes the processor's own image token. What a type needs besides is in `CHANGES`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    ShieldGemma2ForImageClassification,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from mslora_cr.models.processor_base import UnusedPart, _without_video
from tests.helpers.families import _tokenizer, write

WIDTH, HEADS, LAYERS = 64, 4, 4
SIZES = {
    r"(.*_)?(hidden_size|embed_dim|d_model|n_embd|hidden_dim|projection_dim|embedding_dim)": WIDTH,
    r"width|dim|(.*_)?(intermediate_size|ffn_dim|mlp_dim|inner_dim)|vision_output_dim|.*hidden_size_.*": WIDTH,
    r"(.*_)?(num_attention_heads|num_heads|n_head|attention_heads)": HEADS,
    r"(.*_)?num_key_value_heads|num_experts_per_tok|(?!index_).*topk|.*top_k_experts|moe_k": 2,
    r"(.*_)?(num_hidden_layers|depth|num_layers|n_layer|encoder_layers|num_global_layers)": LAYERS,
    r"n_routed_experts|(.*_)?num_(local_)?experts": 4,
    r"(.*_)?head_dim|.*_lora_rank": WIDTH // HEADS,
    r"n_group|topk_group|first_k_dense_replace": 1,
    r"(.*_)?num_shared_experts|n_shared_experts": 1,
}
"""What each number of a configuration becomes, by a pattern of its name."""
NAMED = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "fast_vlm": "LlavaProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "kosmos-2": "Kosmos2Processor",
    "kosmos-2.5": "Kosmos2_5Processor",
    "mistral4": "PixtralProcessor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
    "vision-encoder-decoder": "TrOCRProcessor",
}
"""The processors of types that transformers maps to none: the published folders name them."""
TOKENS: dict[str, list[str]] = {
    "chameleon": [f"IMGIMG{letter}Z" for letter in "ABCDEFGH"],
    "emu3": ["<|extra_200|>", *(f"<|visual token {number:06}|>" for number in range(8))],
    "fuyu": ["|SPEAKER|", "|NEWLINE|", *(f"<0x0{number}>" for number in range(5))],
}
"""The tokens of a type that its processor's source does not spell out."""
CONFIGURED = {"evolla": "EvollaProcessor"}
"""The types of whose folder only the configuration is made, with the name of its processor: its model reads proteins, and
`AutoModelForImageTextToText` does not build it."""
WRITTEN = {
    "fuyu": "",
    "hunyuan_vl": "{image_start_token}{image_token}{image_end_token}",
    "qianfan_ocr": "<image>",
    "qwen2_5_omni_thinker": "{vision_bos_token}{image_token}{vision_eos_token}",
    "qwen3_omni_moe_thinker": "{vision_bos_token}{image_token}{vision_eos_token}",
}
"""What a chat template writes for an image, unless it is the processor's image token."""
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MLA = {"num_key_value_heads": HEADS, "qk_nope_head_dim": WIDTH // HEADS, "v_head_dim": WIDTH // HEADS}
FASTVIT = {"inference_mode": True, "layers": [1] * 5, "embed_dims": [16, 16, 32, 32, 32]}
PE = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "img_size": [56, 56], "ref_feat_shape": [4, 4]}
PE |= {"global_pool": "", "use_post_transformer_norm": False}
CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"vision_config.patch_size": 14, "vision_config.image_size": 980},
    "chameleon": {"vocabulary_map": lambda tokenizer: tokenizer.get_vocab(), "vq_config.num_embeddings": 8}
    | {"vq_config.channel_multiplier": [1, 1, 1, 1, 1], "vq_config.base_channels": 32, "vq_config.embed_dim": 16},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "cosmos3_edge": {"text_config.rope_parameters": MROPE},
    "deepseek_vl_hybrid": {"high_res_vision_config.image_size": 1024},
    "deepseek_ocr2": {"text_config.num_experts_per_tok": 2, "text_config.n_group": 1, "text_config.topk_group": 1}
    | {"vision_config.sam_config.downsample_channels": [WIDTH, WIDTH]}
    | {"text_config.mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.top_k_experts": 2}
    | {"text_config.moe_intermediate_size": WIDTH, "text_config.global_head_dim": WIDTH // HEADS},
    "dots3_note": {f"text_config.{name}": value for name, value in MLA.items()}
    | {f"text_config.swa_{name}": value for name, value in MLA.items()}
    | {"text_config.index_n_heads": 2, "text_config.index_topk": 64}
    | {"text_config.swa_num_attention_heads": HEADS, "text_config.swa_head_dim": WIDTH // 2}
    | {"vision_config.pyramid_num_routed": [-1, -1, 2, 4], "vision_config.adapter_in_dim": WIDTH}
    | {"vision_config.adapter_out_dim": WIDTH, "audio_config.adapter_out_dim": WIDTH}
    | {"audio_config.adapter_input_size": WIDTH},
    "emu3": {"vocabulary_map": lambda tokenizer: tokenizer.get_vocab() | {"<image>": tokenizer.image_token_id}}
    | {"vq_config.codebook_size": 8, "vq_config.embed_dim": 4, "vq_config.channel_multiplier": [1, 1, 1, 1]}
    | {"vq_config.base_channels": 32, "vq_config.hidden_size": 32},
    "fast_vlm": {"vision_config.hidden_size": WIDTH, "vision_config.model_args": FASTVIT},
    "gemma3n": {"vision_config.model_args": {"channel_multiplier": 0.0625, "msfa_output_resolution": 4}}
    | {"text_config.vocab_size_per_layer_input": len}
    | {"vision_config.hidden_size": 2048, "vision_soft_tokens_per_image": 16}
    | {"text_config.layer_types": ["sliding_attention", "full_attention"] * 2, "text_config.num_kv_shared_layers": 2},
    "gemma4_unified": {"vision_config.mm_embed_dim": WIDTH, "vision_config.output_proj_dims": WIDTH},
    "glm5_next": {f"text_config.{name}": value for name, value in MLA.items()}
    | {"text_config.qk_rope_head_dim": 0, "text_config.index_n_heads": 2, "text_config.index_topk": 64},
    "granite4_vision": {
        "vision_config.patch_size": 14,
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [0, 1, 2, 3],
        "downsample_rate": "4/8",
    },
    "llama4": {
        "image_token_index": lambda tokenizer: tokenizer.convert_tokens_to_ids("<|patch|>"),
    }
    | {"vision_config.intermediate_size": 4 * WIDTH, "vision_config.projector_input_dim": WIDTH}
    | {"vision_config.projector_output_dim": WIDTH},
    "kimi_k25": {"text_config.num_key_value_heads": HEADS},
    "mistral3": {"vision_config.patch_size": 14},
    "mistral_large4": {"vision_config.patch_size": 14, "text_config.num_key_value_heads": HEADS},
    "molmo2": {
        "adapter_config.vision_feature_layer": [3, 1],
        "image_patch_id": lambda tokenizer: tokenizer.convert_tokens_to_ids("<im_patch>"),
    },
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {"out_hidden_size": 4 * WIDTH},
    "perception_lm": {"vision_config.architecture": "vit_pe_core_large_patch14_336", "vision_config.model_args": PE}
    | {"projector_pooling_ratio": 2},
    "qwen4_exp": {"text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1}
    | {"text_config.indexer_head_dim": 16, "text_config.indexer_budget": 64, "text_config.indexer_compress_ratio": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": lambda tokenizer: tokenizer.vision_bos_token_id},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": lambda tokenizer: tokenizer.vision_bos_token_id},
    "step3p7": {"vision_config.patch_size": 14, "text_config.layer_types": ["full_attention", "sliding_attention"] * 2}
    | {"text_config.sliding_window": 16, "text_config.num_sliding_attention_heads": 2 * HEADS},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [WIDTH, WIDTH]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit", "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4},
        "decoder": {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 2, "n_head": 4},
    },
}
"""What the configuration of a type needs besides; names of parts are joined by dots."""
SIDE_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
IMAGES: dict[str, dict[str, Any]] = {
    "aya_vision": {"size": {"height": 364, "width": 364}},
    "chameleon": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    "dots3_note": {"temporal_patch_size": 1},
    "emu3": {"min_pixels": 32 * 32, "max_pixels": 64 * 64},
    "fast_vlm": {"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}},
    "gemma3n": {"size": {"height": 64, "width": 64}},
    "granite4_vision": SIDE_336,
    "llava_next_video": SIDE_336,
    "qianfan_ocr": {"size": {"height": 448, "width": 448}},
    "mistral3": {"patch_size": 14},
    "mistral_large4": {"patch_size": 14},
    "perception_lm": {"tile_size": 56, "max_num_tiles": 4},
}
"""The settings of a type's image processor."""
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
PROCESSORS: dict[str, dict[str, Any]] = {
    "chameleon": {"image_seq_length": 16},
    "fast_vlm": {"patch_size": 64, "vision_feature_select_strategy": "full"},
    "gemma3n": {"image_seq_length": 16},
    "granite4_vision": {**LLAVA, "downsample_rate": "4/8"},
    "llava_next_video": LLAVA,
    "mistral3": {"patch_size": 14, "spatial_merge_size": 2},
    "mistral_large4": {"patch_size": 14, "spatial_merge_size": 2},
    "perception_lm": {"patch_size": 14},
    "vipllava": LLAVA,
}
"""The settings of a type's processor."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ 'IMAGE' }}{% elif message['role'] == 'user' %}{{ item['text'] + '\n' }}{% else %}"
    "{% generation %}{{ item['text'] + '</s>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
GEOMETRY = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "merge_size",
    "downsample_factor": "downsample_factor",
}
"""What a tower has from its image processor."""
NO_ROLE = ("bos_token", "eos_token", "pad_token", "unk_token")


def make_any(kind: str, folder: Path) -> None:
    """Write a tiny model of a type, with its processor.

    Raises:
        ImportError: The type needs a package that is not installed.
    """
    if kind in CONFIGURED:
        CONFIG_MAPPING[kind]().save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": CONFIGURED[kind]}))
        return
    processor = processor_of(kind)
    write(lambda: (model_of(kind, processor), processor), folder)


# --- the processor ---


def processor_of(kind: str) -> Any:
    name = PROCESSOR_MAPPING_NAMES.get(kind) or NAMED[kind]
    processor_class = processor_class_from_name(name)
    tokenizer = _tokenizer_for(processor_class, TOKENS.get(kind, []))
    parts: dict[str, Any] = {}
    for part in processor_class.get_attributes():
        made = tokenizer if part.endswith("tokenizer") else UnusedPart()
        parts[part] = _image_processor(kind) if part == "image_processor" else made
    processor = _without_video(processor_class)(**parts, **PROCESSORS.get(kind, {}))
    named = {role: getattr(tokenizer, role) for role in tokenizer.init_kwargs["extra_special_tokens"]}
    image = getattr(processor, "image_token", None) or named.get("image_token", "<image>")
    written = WRITTEN.get(kind, "{image_token}").format(**{**named, "image_token": image})
    processor.chat_template = TEMPLATE.replace("IMAGE", written)
    return processor


def image_backends(kind: str) -> Mapping[str, str]:
    """The classes of a type's image processor by backend: `pil`, `torchvision`."""
    if kind in IMAGE_PROCESSOR_MAPPING_NAMES:
        return IMAGE_PROCESSOR_MAPPING_NAMES[kind]
    module = processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(kind) or NAMED[kind]).__module__.split(".")[-2]
    named = {model_type_to_module_name(name): backends for name, backends in IMAGE_PROCESSOR_MAPPING_NAMES.items()}
    return named[module]


def needs_torchvision(kind: str) -> bool:
    """Whether a type's images or its processor need torchvision."""
    name = PROCESSOR_MAPPING_NAMES.get(kind) or NAMED.get(kind)
    needed = getattr(processor_class_from_name(name), "__backends", ()) if name else ()
    return "pil" not in image_backends(kind) or "torchvision" in needed


def _image_processor(kind: str) -> Any:
    backends = image_backends(kind)
    return get_image_processor_class_from_name(backends.get("pil") or backends["torchvision"])(**IMAGES.get(kind, {}))


def _tokenizer_for(processor_class: Any, more: Sequence[str]) -> Any:
    """A tokenizer with every token that a processor's source names, as its attribute where the source reads one."""
    source = inspect.getsource(importlib.import_module(processor_class.__module__))
    source = re.sub(r'"""[\s\S]*?"""|#.*', "", source)
    roles = dict(re.findall(r'getattr\(\s*(?:self\.)?tokenizer,\s*"(\w+_token)",\s*"([^"]+)"', source))
    roles |= dict(re.findall(r'self\.(\w+_token) = \(?\s*"([^"]+)" if not hasattr', source))
    read = re.findall(r"tokenizer\.(\w+_token)\b|getattr\(\s*(?:self\.)?tokenizer,\s*\"(\w+_token)\"", source)
    read = [role for pair in read for role in pair if role]
    constants = [value for name, value in vars(processor_class).items() if name.endswith("_TOKEN")]
    roles = {role: f"<|{role}|>" for role in read} | roles
    roles = {role: token for role, token in roles.items() if role not in NO_ROLE and not role.startswith("add_")}
    spelt = re.findall(r'"(<[^<>"\s{}]{1,40}>|\[[A-Z_]{2,20}\])"', source)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    special = list(dict.fromkeys([*named.values(), *roles.values(), *spelt, *constants, *more]))
    return _tokenizer(special, **named, extra_special_tokens=roles)


# --- the model ---


def model_of(kind: str, processor: Any) -> Any:
    config = _small(CONFIG_MAPPING[kind], {}, processor, CHANGES.get(kind, {}))
    for part in _parts(config):
        _fit_sections(part, part is config.get_text_config() and "mrope_section" in _source(part))
    # The published weights are those of the classifier.
    model = (
        ShieldGemma2ForImageClassification(config)
        if kind == "shieldgemma2"
        else AutoModelForImageTextToText.from_config(config)
    )
    for _name, parameter in model.named_parameters():
        if not parameter.any() and parameter.dim() > 1:  # zeros would show no picture
            parameter.data.normal_(0, 0.02)
    return model


def _source(config: Any) -> str:
    """The source of a configuration's model."""
    module = type(config).__module__.replace("configuration_", "modeling_")
    return inspect.getsource(importlib.import_module(module))


def _small(config_class: Any, given: Mapping[str, Any], processor: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration with small numbers, and that of each of its parts."""
    fields = getattr(config_class, "__dataclass_fields__", {})
    values = {name: field.default for name, field in fields.items()} | dict(given)
    found: dict[str, Any] = {name: value for name, value in given.items() if name in fields}
    for name, value in values.items():
        if name in found or name in fields:
            small = _small_value(name, value, processor)
            if small is not None:
                found[name] = small
    for name, spec in (config_class.sub_configs_defaults or {}).items():
        part = spec.config_class
        if spec.optional and "audio" in name:
            continue
        kind = changes.get(f"{name}.model_type") or spec.model_type
        if part is AutoConfig:
            part = CONFIG_MAPPING[kind]
        inner = {key.removeprefix(f"{name}."): value for key, value in changes.items() if key.startswith(f"{name}.")}
        inner.pop("model_type", None)
        found[name] = _small(part, spec.init_kwargs or {}, processor, inner)
    own = {name: value for name, value in changes.items() if "." not in name}
    found |= {name: value(processor.tokenizer) if callable(value) else value for name, value in own.items()}
    return config_class(**found)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and all that are in it."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _fit_sections(config: Any, parts: bool) -> None:
    """Let positions in three parts cover the width of a head.

    Args:
        parts: Whether the model has such positions even if its configuration does not say so.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = [value for value in rope.values() if isinstance(value, dict)]
    for settings in by_type or [rope]:
        if sections := settings.get("mrope_section", MROPE["mrope_section"] if parts else None):
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            half = int(width * settings.get("partial_rotary_factor", 1.0)) // 2
            third = half // len(sections)
            settings["mrope_section"] = [half - third * (len(sections) - 1)] + [third] * (len(sections) - 1)


def _small_value(name: str, value: Any, processor: Any) -> Any:
    """What a setting becomes; None leaves its default."""
    tokenizer, images = processor.tokenizer, getattr(processor, "image_processor", None)
    if name in GEOMETRY and isinstance(size := getattr(images, GEOMETRY[name], None), int):
        return size
    if name == "image_size" and isinstance(value, int) and (side := _side(images)):
        return side
    if name == "vocab_size" or name.endswith("_vocab_size"):
        return len(tokenizer)
    if role := re.fullmatch(r"(\w+?)_(id|index|token_id|token_index)", name):
        return _token_of(role[1], value, processor)
    if isinstance(value, list | tuple) and re.search(r"(index|indices|indexes|layers|_ids)$", name):
        return [0]
    if isinstance(value, int) or (value is None and name in ("num_key_value_heads", "head_dim")):
        if isinstance(value, bool):
            return None
        return next((small for pattern, small in SIZES.items() if re.fullmatch(pattern, name)), None)
    return None


def _side(images: Any) -> int | None:
    """The side of the squares that an image processor makes; None if it keeps an image's shape."""
    size = dict(getattr(images, "crop_size", None) or getattr(images, "size", None) or {})
    return size.get("height")


def _token_of(role: str, value: Any, processor: Any) -> int | None:
    """The id of a token by the role that a configuration gives it."""
    tokenizer = processor.tokenizer
    for owner in (processor, tokenizer):
        for name in (f"{role}_token_id", f"{role}_id"):
            found = getattr(owner, name, None)
            if isinstance(found, int):
                return found
        token = getattr(owner, f"{role}_token", None)
        if isinstance(token, str):
            return int(tokenizer.convert_tokens_to_ids(token))
    return min(value, len(tokenizer) - 1) if isinstance(value, int) and not isinstance(value, bool) else None
