"""Lists the contents of a base model's folder, and compares the two vision towers that it names.

LLaVA-Med's shards contain a tower of their own, but the published code silently loads the one that `mm_vision_tower`
names. The comparison shows whether that matters: the largest difference of each tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mslora_cr.data.chat import messages_of, render
from mslora_cr.data.prompts import generation_prompt
from mslora_cr.data.records import Turn
from mslora_cr.data.tokenizer import Tokenizer, TokenizerError
from mslora_cr.models.describe import described
from mslora_cr.models.family import family_of
from mslora_cr.models.layout import ModelError, read_config, shard_files, tensor_name
from mslora_cr.models.processor_base import load_processor
from mslora_cr.models.vision import load_named_tower

_TOWER = "model.vision_tower."


def inspect(path: Path) -> dict[str, Any]:
    """Return sizes, dtypes, vocabulary, prompt template, and the difference of the two towers.

    Returns:
        `layout`, `files` (bytes of each), `tensors`, `parameters`, `parameters_by_dtype`, `vocabulary` (rows of the
        embedding, pieces of the tokenizer), `template`, the content of `described`, and for LLaVA-Med `towers`: the
        named tower, and for each tensor of either the largest absolute difference, or why they cannot be compared.

    Raises:
        ModelError: The folder contains no base model.
    """
    config = read_config(path)
    files = shard_files(path)
    dtypes: dict[str, int] = {}
    own_tower: dict[str, tuple[Path, str]] = {}
    tensors = parameters = 0
    for file in files:
        for stored, (dtype, count) in _header(file).items():
            dtypes[dtype] = dtypes.get(dtype, 0) + count
            tensors, parameters = tensors + 1, parameters + count
            name = tensor_name(stored)
            if name is not None and name.startswith(_TOWER):
                own_tower[name.removeprefix(_TOWER)] = (file, stored)
    pieces: int | str
    if own_prompts := family_of(path).own_template:
        processor = load_processor(path)
        question = messages_of([Turn.model_validate({"from": "human", "value": "QUESTION"})], 1)
        pieces, template = len(processor.tokenizer), render(processor, question, to_answer=True)
    else:
        pieces, template = _pieces(path), generation_prompt("QUESTION")
    return {
        "layout": config["model_type"],
        "files": {file.name: file.stat().st_size for file in files},
        "tensors": tensors,
        "parameters": parameters,
        "parameters_by_dtype": dtypes,
        "vocabulary": {"rows": config.get("text_config", config).get("vocab_size"), "pieces": pieces},
        "template": template,
        **described(path, parameters),
        **({} if own_prompts else {"towers": _towers(path, config, own_tower)}),
    }


def _header(file: Path) -> dict[str, tuple[str, int]]:
    """Return the dtype and the number of elements of each tensor."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), torch.Size(part.get_shape()).numel()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a complete safetensors file ({error})") from None


def _pieces(path: Path) -> int | str:
    try:
        return len(Tokenizer(path))
    except TokenizerError as error:
        return str(error)


def _towers(path: Path, config: dict[str, Any], in_shards: dict[str, tuple[Path, str]]) -> dict[str, Any]:
    named = config.get("mm_vision_tower")
    comparison: dict[str, Any] = {"named": named, "tensors_in_shards": len(in_shards)}
    if named is None or not in_shards:
        return comparison | {"compared": False, "why": "there is only one tower"}
    try:
        theirs = load_named_tower(path, config).state_dict()
    except ModelError as error:
        return comparison | {"compared": False, "why": str(error)}
    differences: dict[str, float | str] = {}
    for name in sorted(in_shards.keys() | theirs.keys()):
        if name not in in_shards or name not in theirs:
            differences[name] = "only in the shards" if name in in_shards else "only in the named tower"
            continue
        file, stored = in_shards[name]
        with safe_open(file, framework="pt") as opened:
            mine = opened.get_tensor(stored)
        if mine.shape != theirs[name].shape:
            differences[name] = f"{list(mine.shape)} in the shards, {list(theirs[name].shape)} in the named tower"
        else:
            differences[name] = (mine.float() - theirs[name].float()).abs().max().item()
    numbers = [value for value in differences.values() if isinstance(value, float)]
    return comparison | {
        "compared": True,
        "largest_difference": max(numbers, default=None),
        "differences": differences,
    }
