"""What each type that `AutoModelForImageTextToText` maps is to this program, for the installed transformers.

    python -m benchmarks.families                    # a table in Markdown, a type a row
    python -m benchmarks.families gemma4 florence2   # these types alone

Types with a builder in `tests/helpers` are tried with a tiny random model and its processor: it is loaded, its labels
must be its answers, and its scores behind a shared opening those of whole prompts. Of the others the default
configuration decides, without weights: whether there is a processor, a decoder, and layers that a bank adapts.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from mslora_cr.generation.exactness import shares_exactly
from mslora_cr.models.base_check import check_model
from mslora_cr.models.language import fused_experts, language_linears
from mslora_cr.models.layout import ModelError
from mslora_cr.models.load import load_model
from mslora_cr.models.processor_base import ProcessorBase, empty_model
from tests.helpers.families import FAMILIES, make
from tests.helpers.more_families import MORE, REFUSED, make_more

HEAD = ("type", "class", "outcome")


def main(argv: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
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
        return _tried(kind) if kind in {*FAMILIES, *MORE, *REFUSED} else _by_configuration(kind)
    except ModelError as error:
        return f"refused: {str(error).partition(': ')[2]}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _tried(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (make if kind in FAMILIES else make_more)(kind, path)
        base = load_model(path, dtype=torch.float32)
        assert isinstance(base, ProcessorBase)
        shared = shares_exactly(base.model, base.input_processor(2048, True))
        base.image_encoder.features([[_image()]], torch.device("cpu"))
    experts = "; fused experts are not adapted" if fused_experts(base.model) else ""
    return f"works, answers {'behind shared openings' if shared else 'whole prompts'}{experts}"


def _image() -> Image.Image:
    return Image.effect_noise((64, 48), 60).convert("RGB")


def _by_configuration(kind: str) -> str:
    if kind not in PROCESSOR_MAPPING_NAMES:
        return "needs a folder that names its processor's class; not tried"
    try:
        model = empty_model(CONFIG_MAPPING[kind]())
    except Exception as error:
        return f"not tried: its default configuration makes no model ({type(error).__name__})"
    check_model(Path(kind), model)
    return f"not tried; a bank would adapt {len(language_linears(model))} layers"


if __name__ == "__main__":
    main(sys.argv[1:])
