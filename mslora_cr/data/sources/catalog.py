"""The published data sets: their folders, sources and questions. Read from `catalog.yaml`."""

import difflib
from functools import cache

import yaml
from pydantic import BaseModel, ConfigDict

from mslora_cr.config.schema import CATALOGUE
from mslora_cr.utils.errors import DataError, nearest


class TestRows(BaseModel):
    """Rows of the published test file by answer type."""

    __test__ = False  # pytest: not a test class
    model_config = ConfigDict(extra="forbid", frozen=True)

    open: int
    closed: int


class DataSet(BaseModel):
    """One entry; the fields are explained at the top of `catalog.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    modality: str
    folder: str
    image_folders: tuple[str, ...]
    source: str
    license: str
    access: str
    raw: tuple[str, ...]
    unit: str = "patient"
    test_rows: TestRows
    questions: dict[str, str]
    notes: str


@cache
def catalog() -> dict[str, DataSet]:
    """Return the data sets by the name of their task, in the order of the published stream."""
    entries = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {name: DataSet(name=name, **entry) for name, entry in entries.items()}


def unusual_modality(modality: str) -> str | None:
    """Return a modality of the catalogue that is close to an unknown one, and so may be meant."""
    modalities = {entry.modality for entry in catalog().values()}
    close = difflib.get_close_matches(modality, modalities - {modality}, n=1, cutoff=0.8)
    return close[0] if close and modality not in modalities else None


def data_set(name: str) -> DataSet:
    """Return the data set of a task.

    Raises:
        DataError: There is none of that name; the message names the nearest one.
    """
    if name not in catalog():
        raise DataError(f"unknown data set {name!r}{nearest(name, catalog())}; known: {', '.join(catalog())}")
    return catalog()[name]
