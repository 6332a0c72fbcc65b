"""Real medical images, a real tokenizer and TRL's chat templates, from packages that `make setup` fetches into
`.venv/test-data` without their dependencies; tests that need them are skipped where they are not there."""

import sys
from pathlib import Path

import pytest

TEST_DATA = Path(sys.prefix) / "test-data"
DICOM = TEST_DATA / "data_store" / "data"
SKIMAGE = TEST_DATA / "skimage" / "data"
STARDIST = TEST_DATA / "stardist" / "data" / "images"
TOKENIZER = TEST_DATA / "mistral_common" / "data" / "tokenizer.model.v1"


def real(path: Path) -> Path:
    """A file or folder of these packages."""
    if not path.exists():
        pytest.skip(f"{path} is not there: `make setup` fetches the packages that have it")
    return path
