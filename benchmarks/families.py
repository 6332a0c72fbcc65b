"""What each type that `AutoModelForImageTextToText` maps is to this program, for the installed packages.

    python -m benchmarks.families                    # a table in Markdown, a type a row
    python -m benchmarks.families gemma4 florence2   # these types alone

Each type is tried with a tiny random model and a processor of its class (`tests/helpers`). Loading it checks its
labels, and an answer with reasoning must be learned whole. A router's features of an image are computed; a bank gets
gradients, and is saved and read; the scores after a shared opening are compared with those of whole prompts; and what
the language model receives from kept features of images with what it receives from pixels.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from mslora_cr.banks.io import load_bank, save_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.data.records import TrainingRecord
from mslora_cr.generation.copied_prefix import CopyingDecoder
from mslora_cr.generation.exactness import exact_decoder
from mslora_cr.generation.model_prefix import ModelPrefixDecoder
from mslora_cr.models.base_check import TURNS, check_loss
from mslora_cr.models.image_encoder import why_not_given
from mslora_cr.models.language import fused_experts
from mslora_cr.models.layout import ModelError, reason
from mslora_cr.models.load import load_model
from mslora_cr.models.processor_base import ProcessorBase
from mslora_cr.training.inputs import loss_mask
from tests.helpers.any_family import make_any, needs_torchvision
from tests.helpers.families import FAMILIES, make
from tests.helpers.more_families import MORE, REFUSED, make_more

HEAD = ("type", "class", "outcome")
RANK = 4
THOUGHT = "it is round and dark"
REASONED = (TURNS[0], {"from": "gpt", "value": f"<think>{THOUGHT}</think> yes it is"})
_FOLDER = re.compile(r"^/\S+: ")
WAYS = {
    ModelPrefixDecoder: "answers behind shared openings",
    CopyingDecoder: "answers behind copied openings",
    None: "answers whole prompts",
}


def main(argv: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """Print the table, one type a row as soon as it has been tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all that are mapped without any")
    chosen = parser.parse_args(argv).types or sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(_line(HEAD), _line("---" for _ in HEAD), sep="\n", flush=True)
    rows = []
    for kind in chosen:
        rows.append((f"`{kind}`", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind], outcome(kind)))
        print(_line(rows[-1]), flush=True)
    return rows


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def outcome(kind: str) -> str:
    """What becomes of a type, in one line."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _tried(kind, Path(folder))
    except ImportError as error:
        return f"not tried: {reason(error)}"
    except ModelError as error:
        return f"refused: {_FOLDER.sub('', str(error)).partition('; missing:')[0]}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _tried(kind: str, folder: Path) -> str:
    made = folder / "model"
    builder = make if kind in FAMILIES else make_more if kind in {*MORE, *REFUSED} else make_any
    builder(kind, made)
    base = load_model(made, dtype=torch.float32)
    assert isinstance(base, ProcessorBase)
    decoder = exact_decoder(base.model, base.input_processor(1 << 15, True))
    base.image_encoder.features([[_image()]], torch.device("cpu"))
    kept = _kept(base)
    _image().save(folder / "image.png")
    _check_reasoning(base, folder)
    _train(base, folder)
    experts = "; fused experts are not adapted" if fused_experts(base.model) else ""
    needs = "; needs timm" if _has_timm(base) else "; needs torchvision" if needs_torchvision(kind) else ""
    return f"works, {WAYS[decoder]}{kept}{experts}{needs}"


def _has_timm(base: ProcessorBase) -> bool:
    return any(type(module).__module__.startswith("timm.") for module in base.model.modules())


def _kept(base: ProcessorBase) -> str:
    """Say why image features cannot be kept; nothing if they can."""
    try:
        base.given_features()
    except ModelError:
        return f"; image features are not kept: {why_not_given(base.model)}"
    return ""


def _batch(base: ProcessorBase, folder: Path, turns: Sequence[Mapping[str, str]]) -> dict[str, torch.Tensor]:
    record = TrainingRecord.model_validate({"id": 1, "image": ["image.png"], "conversations": list(turns)})
    inputs = base.input_processor(1 << 15, True)
    return inputs.batch([inputs.sample(0, record, [folder])])


def _check_reasoning(base: ProcessorBase, folder: Path) -> None:
    """Refuse a type that would learn an answer without the reasoning in front of it."""
    labels = _batch(base, folder, REASONED)["labels"]
    learned = base.processor.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True)
    if THOUGHT.replace(" ", "") not in learned.replace(" ", ""):
        raise ModelError(f"{type(base.model).__name__}: of an answer with reasoning, {learned!r} would be learned")


def _train(base: ProcessorBase, folder: Path) -> None:
    """Train a bank for one step on one record, save it and read it."""
    batch = _batch(base, folder, TURNS)
    keep, targets = loss_mask(batch.pop("labels"))
    del batch["record_index"]
    check_loss(base, batch, keep, targets)
    stack = BankStack(base.model, "merge")
    stack.add_trainable(RANK, RANK)
    stack.model(**batch, logits_to_keep=keep, labels=targets, shift_labels=targets, use_cache=False).loss.backward()
    moved = sum(bool(b.grad is not None and b.grad.any()) for _, b in stack.trainable().values())
    if not moved:
        raise ModelError(f"{type(base.model).__name__}: no layer of a bank gets a gradient")
    save_bank(
        stack.snapshot("task", RANK, RANK, {"base_model": {"architecture": stack.architecture}}),
        folder / "bank",
        0.0,
        {},
    )
    load_bank(folder / "bank")


def _image() -> Image.Image:
    return Image.effect_noise((64, 48), 60).convert("RGB")


if __name__ == "__main__":
    main(sys.argv[1:])
