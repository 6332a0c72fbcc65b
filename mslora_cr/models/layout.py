"""LLaVA-Med's layout on disk: configuration, names of tensors, shards, and the way to transformers' names."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    MistralConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mslora_cr.utils.errors import UserError
from mslora_cr.utils.strict_json import JsonError, read_object

PLACEHOLDER_PIECE = "<0x00>"
"""The byte piece that represents an image patch in `input_ids`: inside the vocabulary, so that `lm_head` keeps its
rows, and produced by no text (a NUL character in a text is refused)."""
LLAVA_MED = "llava_mistral"
"""LLaVA-Med's `model_type`, which transformers does not know."""
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
LANGUAGE_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""Full-match pattern of the linear layers that a bank adapts in LLaVA-Med: all of the language model, nothing else."""
MOST_LAYERS, MOST_WIDTH = 1_000, 10_000_000
_OF_PICKLES = (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, RecursionError)
"""What `torch.load` raises for a damaged file."""
_SIZES = {"hidden_size", "mm_hidden_size", "intermediate_size", "vocab_size", "image_size", "patch_size"}
_SIZES |= {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
_RENAMES = (
    (re.escape(TOWER_PREFIX), "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
    (r"(?=lm_head\.)", ""),
)
_LAYER = re.compile(
    r"(?:model\.language_model|language_model\.model|language_model|model)\.layers\.(0|[1-9][0-9]{0,3})"
    r"\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
)
"""The name of a linear layer of the language model in transformers 4.52 and newer, in older ones, and in LLaVA."""
_WORD, _NUMBER = r"[a-z][a-z0-9_]{0,40}", r"(?:0|[1-9][0-9]{0,3})"
_OTHER_MODELS = re.compile(
    rf"(?:{_WORD}\.){{0,3}}(?:language_model|text_model|llm)\.(?:{_WORD}\.){{0,2}}layers\.{_NUMBER}"
    rf"(?:\.(?:{_WORD}|{_NUMBER})){{1,6}}"
)
"""The same in transformers' models with other layers, or with another name for their language model."""


_MISSING = re.compile(r"requires the (\w+) library|Missing optional dependencies: (\w+)|No module named '(\w+)'")
"""How transformers and Python name a package that is not installed."""


class ModelError(UserError):
    """A base model's folder lacks something or contains something else. The message names it."""


def reason(error: Exception) -> str:
    """Return what an error says, in one line: how to install the package that is missing, if it is that."""
    if missing := _MISSING.search(str(error)):
        package = missing[missing.lastindex or 0].lower()
        return f"it needs {package}: pip install {package}"
    return " ".join(str(error).split()) or type(error).__name__


def read_config(path: Path) -> dict[str, Any]:
    """Return the folder's `config.json`, if it describes LLaVA-Med or an image-text model that transformers knows.

    Raises:
        ModelError: There is no such folder or file, or it describes another architecture.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; set model.path to a LLaVA-Med v1.5 folder, or another model's")
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: config.json is missing")
    try:
        config = read_object(path / "config.json")
    except JsonError as error:
        raise ModelError(f"{error}") from None
    model_type = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if model_type != LLAVA_MED and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"{path}/config.json: model_type is {model_type!r}; expected {LLAVA_MED}, or an image-text model that "
            "transformers knows (llava, qwen3_vl, gemma3, …)"
        )
    check_numbers(path / "config.json", config)
    return config


def check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, before anything of that size is allocated."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(file, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{file}: {key} is {value}; expected a finite number")
        elif key in _SIZES and value is not None:
            most = MOST_LAYERS if key == "num_hidden_layers" else MOST_WIDTH
            several = value if isinstance(value, list) and value else [value]  # height and width, or a size a stage
            if not all(isinstance(size, int) and 1 <= size <= most for size in several):
                raise ModelError(f"{file}: {key} is {value!r}; expected a whole number from 1 to {most:,}")


def from_pretrained(
    kind: Any, source: str | Path, what: str, options: Mapping[str, Any], advice: str = ""
) -> tuple[Any, dict[str, Any]]:
    """Load a model of one of transformers' classes; return it with the report of its loading.

    Args:
        what: The kind of model, for messages.
        advice: Advice for messages.

    Raises:
        ModelError: It cannot be loaded, or its weights are a pickle that is damaged or contains more than tensors.
    """
    try:
        return kind.from_pretrained(source, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except (*_OF_PICKLES, RuntimeError) as error:  # Their text advises loading it anyway.
        if not isinstance(error, pickle.UnpicklingError) and any(Path(source).glob("*.safetensors")):
            raise  # No pickle was read, so the device complains.
        raise ModelError(f"{source}: the weights of {what} are not plain tensors, so they are not opened") from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{source}: {what} cannot be loaded ({reason(error)}){advice}") from None


def llava_config(config: Mapping[str, Any], vision_config: CLIPVisionConfig) -> LlavaConfig:
    """Return transformers' configuration of a LLaVA-Med one. Values that its defaults get wrong are required."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys = (*sizes, "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "hidden_act")
    missing = [key for key in keys if key not in config]
    if missing:
        raise ModelError(f"config.json: missing {', '.join(missing)}")
    for key, wanted in (("mm_projector_type", "mlp2x_gelu"), ("mm_vision_select_feature", "patch")):
        if config.get(key) != wanted:
            raise ModelError(f"config.json: {key} is {config.get(key)!r}; only {wanted!r} is known")
    text = MistralConfig(
        **{key: config[key] for key in keys},
        sliding_window=config.get("sliding_window"),
        attention_dropout=config.get("attention_dropout", 0.0),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_id=config.get("eos_token_id", 2),
        pad_token_id=config.get("pad_token_id", 0),
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision_config,
        projector_hidden_act="gelu",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def shard_files(path: Path) -> list[Path]:
    """Return the model's safetensors files, from its index or the single file.

    Raises:
        ModelError: There are none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{path}: neither model.safetensors.index.json nor model.safetensors exists")
        return [single]
    return indexed_files(index)


def indexed_files(index: Path) -> list[Path]:
    """Return the files over which an index spreads the weights; they must be in its folder."""
    path = index.parent
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: not an index of weights ({error!r})") from None
    if outside:
        raise ModelError(f"{index}: names {outside[0]!r}, which is not a file in this folder")
    files = [path / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path}: missing {', '.join(missing)}, which {index.name} names")
    return files


def tensor_name(name: str) -> str | None:
    """Return transformers' name of a LLaVA tensor, or None for a name that is not LLaVA's."""
    for pattern, replacement in _RENAMES:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    return None


def published_linear_name(module: str) -> str:
    """Return the published checkpoints' name (`model.layers.N.…`) of a language-model linear layer, from transformers'
    name.
    """
    return "model.layers." + module.rpartition("language_model.layers.")[2]


def linear_name(name: str, exact: bool = False) -> str | None:
    """Return transformers' name of a language-model linear layer, from the published name (the inverse of
    `published_linear_name`), that of an older transformers, or itself; None for any other name.

    Args:
        exact: This program wrote the file, with the model's own names.
    """
    if exact and _OTHER_MODELS.fullmatch(name):
        return name
    match = _LAYER.fullmatch(name)
    if match is None:
        return name if _OTHER_MODELS.fullmatch(name) else None
    return f"model.language_model.layers.{match[1]}.{match[2]}" if match else None


def shard_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], already: set[str], own_tower: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield every wanted tensor of the shards under transformers' name, after checking all names and shapes."""
    locations: dict[str, tuple[Path, str]] = {}
    unexpected, misshapen = [], []
    for file in shard_files(path):
        for stored, shape in _header(file).items():
            if stored.startswith(TOWER_PREFIX) and not own_tower:
                continue
            name = tensor_name(stored)
            if name is None or name not in expected:
                unexpected.append(stored)
            elif shape != expected[name]:
                misshapen.append(f"{stored} {list(shape)} instead of {list(expected[name])}")
            else:
                locations[name] = (file, stored)
    _check_names(path, set(expected) - set(locations) - already, set(unexpected), misshapen)
    opened: dict[Path, Any] = {}
    for name, (file, stored) in locations.items():
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        yield name, opened[file].get_tensor(stored)


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a complete safetensors file ({error})") from None


def check_report(path: str | Path, report: Mapping[str, Any], unexpected: set[str]) -> None:
    """Refuse what transformers reports after loading."""
    misshapen = [
        f"{name} {list(stored)} instead of {list(wanted)}" for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    _check_names(path, set(report["missing_keys"]), unexpected, misshapen)


def _check_names(path: str | Path, missing: set[str], unexpected: set[str], misshapen: list[str] | None = None) -> None:
    parts = []
    for what, names in (
        ("missing", sorted(missing)),
        ("unexpected", sorted(unexpected)),
        ("of another shape", misshapen or []),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(f"{what}: {', '.join(names[:8])}{more}")
    if parts:
        raise ModelError(f"{path}: the weights do not fit the configuration; " + "; ".join(parts))


def save_llava_layout(state: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path, shards: int = 2) -> None:
    """Write tensors under transformers' names as a folder in LLaVA-Med's layout: config, shards and index.

    Args:
        state: A LLaVA state dict under transformers' names, in the dtype to store.
        config: The `config.json` to write (`model_type: llava_mistral`, …).
        shards: The number of files over which tensors are spread by size.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    total = sum(tensor.nbytes for tensor in state.values())
    parts: list[list[str]] = [[] for _ in range(shards)]
    written = 0
    for name, tensor in state.items():
        parts[min(shards - 1, written * shards // max(total, 1))].append(name)
        written += tensor.nbytes
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        # Clone one shard at a time: tensors may be views of each other's memory, which safetensors refuses.
        save_file({_llava_name(name): state[name].clone() for name in names}, directory / file, {"format": "pt"})
        weight_map.update({_llava_name(name): file for name in names})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _llava_name(name: str) -> str:
    for ours, theirs in (
        ("model.vision_tower.", TOWER_PREFIX),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
