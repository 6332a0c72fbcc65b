"""Describes a base model without loading its weights: adapted layers, image positions, memory, unused features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from mslora_cr.data.chat import messages_of, render
from mslora_cr.data.records import Turn
from mslora_cr.models.base_check import check_model, check_processor
from mslora_cr.models.family import family_of
from mslora_cr.models.image_encoder import why_not_given
from mslora_cr.models.language import fused_experts, last_mlp
from mslora_cr.models.layout import ModelError, read_config
from mslora_cr.models.processor_base import empty_model_of, end_ids, load_processor, template_date
from mslora_cr.models.shapes import language_linear_shapes
from mslora_cr.models.vision import tower_config, tower_source

SIZES = ((224, 224), (448, 448), (1024, 768))
"""Image sizes that describe a model whose images take different numbers of positions."""
RANK, GPUS = 64, 8


def switched_off(path: Path, model: PreTrainedModel, projector_changes: bool = False) -> tuple[str, ...]:
    """Return optimisations of LLaVA-Med that this model does not use, and why; the ledger records them.

    Args:
        projector_changes: Whether banks have projectors of their own.

    Raises:
        ModelError: The folder's configuration cannot be read.
    """
    if not family_of(path).own_template:
        return ()
    sparse = () if last_mlp(model) is not None else ("the last MLP at labelled positions alone",)
    experts = ("banks on fused experts",) if fused_experts(model) else ()
    why = "banks change the projector" if projector_changes else why_not_given(model)
    features = (f"cached image features: {why}",) if why else ()
    return (*features, *sparse, *experts)


def fixed_date(path: Path) -> str | None:
    """Apply `template_date` to a base model's folder.

    Raises:
        ModelError: The folder's configuration or processor cannot be read.
    """
    return template_date(load_processor(path)) if family_of(path).own_template else None


def described(path: Path, parameters: int, rank: int = RANK) -> dict[str, Any]:
    """Describe a base model, for `model inspect` and a plan.

    Args:
        parameters: The number of parameters of the whole model.

    Returns:
        `adapted` (linear layers by kind), `not_adapted` (parameters of fused experts, where there are any),
        `template_date` (the date that stands for today's, where the chat template asks for it), `bank` (its rank and
        parameters), `positions` (of an image of a size), `memory` (GB a GPU by ZeRO stage, as
        `memory_by_stage`).

    Raises:
        ModelError: The folder contains no base model.
    """
    facts: dict[str, Any] = {}
    if family_of(path).own_template:
        model, processor = _checked(path)
        facts = {"not_adapted": experts} if (experts := fused_experts(model)) else {}
        facts |= {"template_date": date} if (date := template_date(processor)) else {}
    shapes = language_linear_shapes(path)
    trained = rank * sum(rows + columns for rows, columns in shapes.values())
    return {
        "adapted": _by_kind(shapes),
        **facts,
        "bank": {"rank": rank, "parameters": trained},
        "positions": positions(path),
        "memory": {"gpus": GPUS, "GB": memory_by_stage(parameters, trained, GPUS)},
    }


def summary(path: Path) -> list[str]:
    """Return the lines of a plan about a base model with its own processor; none for LLaVA-Med.

    Raises:
        ModelError: The folder contains no base model.
    """
    if not family_of(path).own_template:
        return []
    model, processor = _checked(path)
    date = template_date(processor)
    each = ", ".join(f"{count} of {size}" for size, count in positions(path).items())
    experts = [f"not adapted: {count} parameters of fused experts"] if (count := len(fused_experts(model))) else []
    return [
        f"base model: {type(model).__name__}, {len(language_linear_shapes(path))} layers adapted",
        *experts,
        *([f"today's date in the chat template: always {date}"] if date else []),
        f"positions of an image: {each}",
        *([f"not used with it: {', '.join(off)}"] if (off := switched_off(path, model)) else []),
    ]


def _checked(path: Path) -> tuple[PreTrainedModel, Any]:
    """Return a folder's model, without weights, and its processor; refuse what `train` would refuse."""
    model, processor = empty_model_of(path), load_processor(path)
    check_model(path, model)
    check_processor(path, processor, end_ids(model, processor))
    return model, processor


def _by_kind(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for name in shapes:
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def positions(path: Path) -> dict[str, int | str]:
    """Return how many positions of a prompt an image takes, by its width and height; or why this is unknown."""
    if not family_of(path).own_template:
        config = read_config(path)
        try:
            vision = config.get("vision_config") or tower_config(tower_source(path, config, "config")).to_dict()
        except ModelError as error:
            return {"any": str(error)}
        return {"any": (int(vision["image_size"]) // int(vision["patch_size"])) ** 2}
    processor = load_processor(path)
    question = [Turn.model_validate({"from": "human", "value": "?"})]
    bare = len(processor.tokenizer(render(processor, messages_of(question, 0), to_answer=True)).input_ids)
    text = render(processor, messages_of(question, 1), to_answer=True)
    counts: dict[str, int | str] = {}
    for width, height in SIZES:
        images = [[Image.new("RGB", (width, height))]]
        ids = processor(text=[text], images=images, return_tensors="pt").input_ids[0]
        counts[f"{width} x {height}"] = len(ids) - bare
    return counts


def memory_by_stage(base: int, bank: int, gpus: int) -> dict[str, float]:
    """Return how many GB of a GPU training a bank takes between steps, without activations, in bfloat16.

    A frozen number takes two bytes. A trained one takes its copy, its gradient, and 12 bytes of float32 master copy and
    AdamW's two moments; each ZeRO stage partitions one of these more. Source: Rajbhandari et al., "ZeRO", 2020, section
    3. DDP keeps the bank and its gradient in float32.

    Args:
        base: The number of parameters of the base model.
        bank: The number of parameters of a bank.
        gpus: The number of GPUs that share the training state.
    """
    bytes_of = {
        "ddp": 2 * base + (4 + 4 + 8) * bank,
        "zero1": 2 * base + (2 + 2) * bank + 12 * bank / gpus,
        "zero2": 2 * base + 2 * bank + (2 + 12) * bank / gpus,
        "zero3": (2 * base + (2 + 2 + 12) * bank) / gpus,
    }
    return {stage: round(size / 1e9, 2) for stage, size in bytes_of.items()}
