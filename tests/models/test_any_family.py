"""Every type of image-text model that transformers maps works, or is refused in one line with the reason."""

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.families import outcome
from tests.conftest import first_in_make_test

TABLE = Path(__file__).parents[2] / "docs/reference/base-models.md"
ROWS = {
    cells[1].strip(" `"): cells[3].strip()
    for line in TABLE.read_text().splitlines()
    if line.startswith("| `") and (cells := line.split("|"))
}
HERE = [kind for kind, said in ROWS.items() if "torchvision" not in said and "timm" not in said]
"""The types that need no package beside those that are installed for tests."""
FIRST = ("qwen3_5", "minicpmv4_6", "cosmos3_edge")


def test_the_table_has_every_type_and_leaves_none_open() -> None:
    assert ROWS.keys() == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    assert not [kind for kind, said in ROWS.items() if said.startswith("fails")]


@pytest.mark.parametrize("kind", first_in_make_test(*FIRST, *(k for k in HERE if k not in FIRST), first=len(FIRST)))
def test_a_type_is_what_the_table_says(kind: str) -> None:
    found = outcome(kind)
    if "ImportError: " in found or "ModuleNotFoundError: " in found:
        pytest.skip(f"the table was made with torchvision; here it is {found}")
    assert found == ROWS[kind]
