"""Every type of image-text model that transformers maps works, or is refused in one line with the reason."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.families import outcome
from mslora_cr.models.layout import ModelError
from mslora_cr.models.processor_base import empty_model_of, load_processor
from tests.conftest import first_in_make_test

TABLE = Path(__file__).parents[2] / "docs/reference/base-models.md"
ROWS = {
    cells[1].strip(" `"): cells[3].strip()
    for line in TABLE.read_text().splitlines()
    if line.startswith("| `") and (cells := line.split("|"))
}
HERE = [kind for kind, said in ROWS.items() if "torchvision" not in said and "timm" not in said]
"""The types that need no package beside those that are installed for tests."""
FIRST = ("qwen3_5", "minicpmv4_6", "cosmos3_edge", "diffusion_gemma")


def test_the_table_has_every_type_and_leaves_none_open() -> None:
    assert ROWS.keys() == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    assert not [kind for kind, said in ROWS.items() if not said.startswith(("works, ", "refused: "))]


@pytest.mark.parametrize("kind", first_in_make_test(*FIRST, *(k for k in HERE if k not in FIRST), first=len(FIRST)))
def test_a_type_is_what_the_table_says(kind: str) -> None:
    found = outcome(kind)
    if found.startswith("not tried: "):
        pytest.skip(f"the table was made with torchvision and timm; here it is {found}")
    assert found == ROWS[kind]


@pytest.mark.parametrize(
    ("package", "kind", "processor", "attempt"),
    [
        ("timm", "fast_vlm", "LlavaProcessor", empty_model_of),
        ("torchvision", "perception_lm", "PerceptionLMProcessor", load_processor),
    ],
)
def test_a_missing_package_is_named(
    package: str, kind: str, processor: str, attempt: Callable[[Path], Any], tmp_path: Path
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    settings = {"processor_class": processor, "image_processor": {"image_processor_type": "PerceptionLMImageProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        attempt(tmp_path)
    assert str(caught.value).endswith(f"cannot be loaded (it needs {package}: pip install {package})")
