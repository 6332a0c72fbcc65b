"""LLaVA-Med on disk → transformers' `LlavaForConditionalGeneration`. The only file that knows LLaVA's names.

LLaVA-Med v1.5 is stored as `model_type: llava_mistral`, which transformers does not know. The weights map one to one
onto transformers' LLaVA (Mistral text model, CLIP tower, two-layer GELU projector), so no model code is needed here.
The shards carry a vision tower of their own; the published code ignores it and loads the one `mm_vision_tower` names.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mslora_cr.data.images import tower_folder
from mslora_cr.data.tokenizer import Tokenizer, TokenizerError
from mslora_cr.errors import UserError

PLACEHOLDER_PIECE = "<0x00>"
"""The byte piece that represents an image patch in `input_ids`: inside the vocabulary, so that `lm_head` keeps its
rows, and produced by no text (a NUL character in a text is refused)."""

LANGUAGE_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""Full-match pattern of the linear layers that a bank adapts: all of the language model, nothing else."""

MOST_LAYERS, MOST_WIDTH = 1_000, 10_000_000
_SIZES = {"hidden_size", "mm_hidden_size", "intermediate_size", "vocab_size", "image_size", "patch_size"}
_SIZES |= {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}

WHOLE_BYTES, END_BYTES, BLOCK_BYTES, BLOCKS = 64 << 20, 1 << 20, 64 << 10, 16
"""`weights_digest`: files up to the first are read whole; of larger ones, their two ends and blocks between them."""
_SETTINGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""The small files that decide what a model does with a text and an image."""

UNQUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""What keeps its dtype beside a language model in 4 or 8 bits: a small part of the memory, and the most exact one."""

_TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
_RENAMES = (
    (re.escape(_TOWER_PREFIX), "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
    (r"(?=lm_head\.)", ""),
)
_PUBLISHED_LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)")


class ModelError(UserError):
    """A base model's folder is missing something or holds something else; the message names it."""


@dataclass
class LlavaMed:
    """A loaded base model with what is needed to feed it."""

    model: LlavaForConditionalGeneration
    tokenizer: Tokenizer
    image_processor: Any
    image_token_id: int
    """The id that represents one image patch."""
    patches: int
    """Image patches, hence positions, per image."""


def load(
    path: str | Path,
    vision_tower: str = "config",
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> LlavaMed:
    """Load a base model, frozen and in evaluation mode, from LLaVA-Med's own layout or transformers' LLaVA layout.

    Args:
        path: the model's folder.
        vision_tower: `config` (what `mm_vision_tower` names: a folder relative to the config or to the working
            directory, an absolute one, or a hub name), `checkpoint` (the tower inside the shards), or a folder or hub
            name to use instead.
        quantization: `4bit` (NF4 with quantised constants) or `8bit` (LLM.int8) for the language model's linear
            layers, which compute in `dtype`; everything else keeps `dtype`. A layer is quantised as it is read, so
            the device never holds the whole model.

    Raises:
        ModelError: a file or weight is missing, unexpected, or of another shape; all of them are named.
        ModuleNotFoundError: `quantization` without bitsandbytes.
    """
    path = Path(path)
    config = read_config(path)
    options = _loading_options(dtype, quantization, device)
    if config.get("model_type") == "llava":
        if vision_tower not in ("config", "checkpoint"):
            raise ModelError(f"{path}: transformers' layout includes its tower; set model.vision_tower to config")
        tower_source: str | Path = path
        model = _load_transformers_layout(path, options)
    else:
        tower_source = _tower_source(path, config, vision_tower)
        model = _load_llava_layout(path, config, vision_tower, tower_source, options)
    model.set_attn_implementation(attn_implementation)
    if quantization is None:
        model.to(device)
    model.requires_grad_(False)
    model.eval()
    return _with_processors(path, model, tower_source)


def last_mlp(model: LlavaForConditionalGeneration) -> nn.Module:
    """The MLP of the language model's last decoder layer."""
    return model.model.language_model.layers[-1].mlp


def detach_tower(model: LlavaForConditionalGeneration) -> nn.Module:
    """Take the vision tower out of a model, which then takes its features (`tower_features`) where it took pixels."""
    tower = model.model.vision_tower
    model.model.vision_tower = _GivenFeatures(model.config.vision_feature_layer)
    return tower


def tower_features(tower: nn.Module, layer: int, pixels: Tensor) -> Tensor:
    """(images, positions, width): the tower's hidden states that the projector reads, class position included."""
    return tower(pixels, output_hidden_states=True).hidden_states[layer]


class _GivenFeatures(nn.Module):
    """Takes a tower's place: its input is already the features."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, hidden_states={self.layer: pixel_values})


def read_config(path: Path) -> dict[str, Any]:
    """The folder's `config.json`, if it is one of the two layouts.

    Raises:
        ModelError: no such folder or file, or another architecture.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; set model.path to a LLaVA-Med v1.5 folder")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: config.json is missing") from None
    except ValueError as error:
        raise ModelError(f"{path}/config.json: not JSON ({error})") from None
    except RecursionError:
        raise ModelError(f"{path}/config.json: nested too deeply") from None
    known = ("llava_mistral", "llava")
    if not isinstance(config, dict) or config.get("model_type") not in known:
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError(f"{path}/config.json: model_type is {found!r}; expected one of {', '.join(known)}")
    _check_numbers(path / "config.json", config)
    return config


def _check_numbers(place: Path, config: Mapping[str, Any]) -> None:
    """Refuse what no model has, before anything of that size is made."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_numbers(place, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{place}: {key} is {value}; expected a finite number")
        elif key in _SIZES and value is not None:
            most = MOST_LAYERS if key == "num_hidden_layers" else MOST_WIDTH
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ModelError(f"{place}: {key} is {value!r}; expected a whole number from 1 to {most:,}")


def _loading_options(dtype: torch.dtype, quantization: str | None, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` is told besides the place.

    The method and its settings are those of QLoRA (Dettmers et al., 2023) and LLM.int8 (Dettmers et al., 2022).
    """
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is None:
        return options
    import bitsandbytes  # noqa: F401  (transformers would only say that it is missing after reading every header)

    kind: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=UNQUANTISED)
    return {**options, "quantization_config": settings, "device_map": {"": device}}


def _load_transformers_layout(path: Path, options: Mapping[str, Any]) -> LlavaForConditionalGeneration:
    model, report = _from_pretrained(LlavaForConditionalGeneration, path, "the model", options)
    _refuse_report(path, report, set(report["unexpected_keys"]))
    return model


def _from_pretrained(
    kind: Any, source: str | Path, what: str, options: Mapping[str, Any], advice: str = ""
) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' classes, and the report of its loading; `what` it is and `advice` are for errors.

    Raises:
        ModelError: it cannot be loaded, or its weights are a pickle that is damaged or holds more than tensors.
    """
    try:
        return kind.from_pretrained(source, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except (pickle.UnpicklingError, RuntimeError) as error:  # their text advises to load it all the same
        if isinstance(error, RuntimeError) and any(Path(source).glob("*.safetensors")):
            raise  # no pickle was read: it is the device that complains
        raise ModelError(f"{source}: the weights of {what} are not plain tensors, so they are not opened") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{source}: {what} cannot be loaded ({error}){advice}") from None


def _load_llava_layout(
    path: Path, config: Mapping[str, Any], vision_tower: str, tower_source: str | Path, options: Mapping[str, Any]
) -> LlavaForConditionalGeneration:
    """Meta model first, then every tensor straight from its shard: never two copies of the weights in memory."""
    dtype = options["dtype"]
    own_tower = vision_tower == "checkpoint"
    tower = None if own_tower else _load_tower(path, tower_source, dtype)
    vision_config = tower.config if tower is not None else _tower_config(tower_source)
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(_llava_config(config, vision_config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    if tower is not None:
        state = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= dict(_shard_tensors(path, expected, already=set(state), own_tower=own_tower))
    if "quantization_config" in options:
        model = LlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state, **options)
    else:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
        model.config.dtype = dtype
    model.generation_config = GenerationConfig(
        bos_token_id=config.get("bos_token_id", 1), eos_token_id=config.get("eos_token_id", 2), pad_token_id=0
    )
    return model


def _llava_config(config: Mapping[str, Any], vision_config: CLIPVisionConfig) -> LlavaConfig:
    """transformers' configuration of a LLaVA-Med one. Values that transformers' defaults get wrong are required."""
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


def language_linear_shapes(path: Path) -> list[tuple[int, int]]:
    """(out, in) of every linear layer that a bank adapts, from the configuration alone.

    Raises:
        ModelError: the folder holds no base model.
    """
    config = read_config(path)
    if config["model_type"] == "llava":
        text = LlavaConfig.from_pretrained(path).text_config
    else:
        text = _llava_config(config, CLIPVisionConfig()).text_config
    width, inner, head = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = [(queries, width), (keys, width), (keys, width), (width, queries)]
    layer += [(inner, width), (inner, width), (width, inner)]
    return layer * text.num_hidden_layers


# --- the vision tower -------------------------------------------------------------------------------------------


def _tower_source(path: Path, config: Mapping[str, Any], vision_tower: str) -> str | Path:
    """The tower's folder, or its hub name where no folder of that name exists."""
    name = vision_tower if vision_tower not in ("config", "checkpoint") else config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path}/config.json: mm_vision_tower is missing")
    folder = tower_folder(path, name)
    if folder is not None:
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{path}/config.json: mm_vision_tower is {name!r}, but there is no such folder in or beside {path}, nor "
            "below the working directory; put CLIP there or set model.vision_tower"
        )
    return name


def load_named_tower(path: Path, config: Mapping[str, Any]) -> CLIPVisionModel:
    """The tower that a LLaVA-Med configuration names, in float32.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    return _load_tower(path, _tower_source(path, config, "config"), torch.float32)


def _tower_config(source: str | Path) -> CLIPVisionConfig:
    if isinstance(source, Path):
        try:
            _check_numbers(source / "config.json", json.loads((source / "config.json").read_text(encoding="utf-8")))
        except FileNotFoundError:  # transformers would take the default sizes
            raise ModelError(f"{source}: config.json is missing") from None
        except (ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{source}/config.json: not a JSON object ({error})") from None
    try:
        return CLIPVisionConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: no configuration of a CLIP vision tower ({error})") from None


def _load_tower(path: Path, source: str | Path, dtype: torch.dtype) -> CLIPVisionModel:
    _tower_config(source)
    tower, report = _from_pretrained(
        CLIPVisionModel,
        source,
        f"the vision tower that {path}/config.json names",
        {"dtype": dtype},
        "; download it, or set model.vision_tower to its folder (or to `checkpoint` for the tower inside the shards)",
    )
    _refuse_report(source, report, unexpected=set())  # a full CLIP has a text model as well
    return tower


# --- the shards --------------------------------------------------------------------------------------------------


def shard_files(path: Path) -> list[Path]:
    """The model's safetensors files, from its index or the single file.

    Raises:
        ModelError: none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{path}: neither model.safetensors.index.json nor model.safetensors exists")
        return [single]
    return _indexed_files(index)


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index spreads the weights over, which must be in its folder."""
    path = index.parent
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of weights ({error!r})") from None
    if outside:
        raise ModelError(f"{index}: names {outside[0]!r}, which is not a file in this folder")
    files = [path / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path}: missing {', '.join(missing)}, which {index.name} names")
    return files


def tensor_name(name: str) -> str | None:
    """LLaVA's name of a tensor → transformers', or None for a name that is not LLaVA's."""
    for pattern, replacement in _RENAMES:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    return None


def published_linear_name(module: str) -> str:
    """transformers' name of a language-model linear layer → the published checkpoints' (`model.layers.N.…`)."""
    return "model.layers." + module.rpartition("language_model.layers.")[2]


def linear_name(published: str) -> str | None:
    """The inverse of `published_linear_name`; None for any other name."""
    match = _PUBLISHED_LAYER.fullmatch(published)
    return f"model.language_model.layers.{'.'.join(match.groups())}" if match else None


def _shard_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], already: set[str], own_tower: bool
) -> Iterator[tuple[str, Tensor]]:
    """Every wanted tensor of the shards under transformers' name, after all names and shapes have been checked."""
    places: dict[str, tuple[Path, str]] = {}
    unexpected, misshapen = [], []
    for file in shard_files(path):
        for stored, shape in _header(file).items():
            if stored.startswith(_TOWER_PREFIX) and not own_tower:
                continue
            name = tensor_name(stored)
            if name is None or name not in expected:
                unexpected.append(stored)
            elif shape != expected[name]:
                misshapen.append(f"{stored} {list(shape)} instead of {list(expected[name])}")
            else:
                places[name] = (file, stored)
    _refuse_differences(path, set(expected) - set(places) - already, set(unexpected), misshapen)
    opened: dict[Path, Any] = {}
    for name, (file, stored) in places.items():
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        yield name, opened[file].get_tensor(stored)


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a complete safetensors file ({error})") from None


def _refuse_report(path: str | Path, report: Mapping[str, Any], unexpected: set[str]) -> None:
    """Refuse what transformers reports after loading."""
    misshapen = [
        f"{name} {list(stored)} instead of {list(wanted)}" for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    _refuse_differences(path, set(report["missing_keys"]), unexpected, misshapen)


def _refuse_differences(
    path: str | Path, missing: set[str], unexpected: set[str], misshapen: list[str] | None = None
) -> None:
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


# --- which weights these are ---------------------------------------------------------------------------------------


def weights_digest(path: Path, vision_tower: str = "config") -> str:
    """What tells one base model from another: a SHA-256, in hexadecimal, in well under a second for 15 GB.

    It covers the model's folder and that of the vision tower that `load` would take with this `vision_tower`:
    configurations, tokenizer and index in full; of the weights, every file's name and size, and all bytes of a file of
    up to 64 MB. Of a larger file it covers the safetensors header (each tensor's name, dtype, shape and offset), the
    first and the last MB, and 16 blocks of 64 KB, evenly spaced. Where the folders stand and what else is in them does
    not matter.

    Weights of another size, dtype or sharding are noticed, and so are weights that were trained further as a whole,
    even where they replace the old ones in place. Not noticed: a large file that differs only outside the blocks
    (damage to a few bytes, or a few matrices that happen to lie between two blocks), and another revision of a tower on
    the hub, of which only the name counts. This is no protection against forgery.

    Raises:
        ModelError: a file is missing, or the configuration or an index is not one.
    """
    digest = hashlib.sha256()
    config = read_config(path)
    if config["model_type"] == "llava":
        _add_files(digest, [*_present(path, *_SETTINGS), *_transformers_files(path)])
        return digest.hexdigest()
    _add_files(digest, [*_present(path, *_SETTINGS, "model.safetensors.index.json"), *shard_files(path)])
    tower = _tower_source(path, config, vision_tower)
    if not isinstance(tower, Path):
        digest.update(tower.encode())
        return digest.hexdigest()
    own_tower = vision_tower == "checkpoint"  # the folder still tells the preprocessing
    _add_files(digest, [*_present(tower, *_SETTINGS), *([] if own_tower else _transformers_files(tower))])
    return digest.hexdigest()


def _present(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _transformers_files(folder: Path) -> list[Path]:
    """The files that transformers takes a folder's weights from, the index included."""
    single = ("model.safetensors", "pytorch_model.bin")
    for file in _present(folder, *(f"{name}{ending}" for name in single for ending in ("", ".index.json"))):
        return [file, *_indexed_files(file)] if file.suffix == ".json" else [file]
    raise ModelError(f"{folder}: contains no weights: neither {' nor '.join(single)}, nor an index of either")


def _add_files(digest: hashlib._Hash, files: Sequence[Path]) -> None:
    for file in files:
        try:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                for start, length in _looked_at(opened, size):
                    opened.seek(start)
                    digest.update(opened.read(length))
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from None


def _looked_at(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """(start, length) of the parts of a file that its digest covers."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    header = 8 + int.from_bytes(file.read(8), "little") if file.name.endswith(".safetensors") else 0
    head = max(END_BYTES, min(header, WHOLE_BYTES))  # a length that no header has is not believed
    places = [size * (number + 1) // (BLOCKS + 1) for number in range(BLOCKS)]
    return [(0, head), *((place, BLOCK_BYTES) for place in places), (size - END_BYTES, END_BYTES)]


# --- tokenizer, image processor ------------------------------------------------------------------------------------


def _with_processors(path: Path, model: LlavaForConditionalGeneration, tower_source: str | Path) -> LlavaMed:
    try:
        tokenizer = Tokenizer(path)
    except TokenizerError as error:
        raise ModelError(str(error)) from None
    rows = model.config.text_config.vocab_size
    image_token_id = model.config.image_token_id
    if image_token_id >= rows or tokenizer.piece_id("<image>") != image_token_id:
        image_token_id = tokenizer.piece_id(PLACEHOLDER_PIECE)
    if image_token_id is None or image_token_id == tokenizer.pad_token_id:
        raise ModelError(f"{path}: the tokenizer has no piece {PLACEHOLDER_PIECE} to represent an image patch")
    model.config.image_token_id = image_token_id
    try:
        processor = AutoImageProcessor.from_pretrained(tower_source, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{tower_source}: no image processor configuration ({error})") from None
    vision = model.config.vision_config
    return LlavaMed(model, tokenizer, processor, image_token_id, (vision.image_size // vision.patch_size) ** 2)


# --- writing -------------------------------------------------------------------------------------------------------


def save_llava_layout(state: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path, shards: int = 2) -> None:
    """Write tensors under transformers' names as a folder in LLaVA-Med's layout: config, shards and index.

    Args:
        state: a LLaVA state dict under transformers' names, cast by the caller to the dtype to store.
        config: the `config.json` to write (`model_type: llava_mistral`, …).
        shards: files to spread the tensors over, by size.
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
        # Cloned one shard at a time: tensors may be views of each other's memory, which safetensors refuses.
        save_file({_llava_name(name): state[name].clone() for name in names}, directory / file, {"format": "pt"})
        weight_map.update({_llava_name(name): file for name in names})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _llava_name(name: str) -> str:
    for ours, theirs in (
        ("model.vision_tower.", _TOWER_PREFIX),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
