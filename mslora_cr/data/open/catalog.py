"""The data sets of the open stream: their sources, questions and flaws. From `catalog.yaml`."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from mslora_cr.utils.errors import DataError, nearest

PREPARED = "prepared.json"
"""What `data prepare open` writes beside a data set: where it came from, and what its two sides share."""


class OpenSource(BaseModel):
    """One entry; the fields are explained at the top of `catalog.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    repository: str
    commit: str
    content: str
    license: str
    commercial: bool
    source: str
    modality: str
    unit: str
    faults: str
    wordings: dict[str, tuple[str, ...]]


@cache
def open_sources() -> dict[str, OpenSource]:
    """Return the sources by name, in the order of the stream."""
    entries = yaml.safe_load(Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8"))
    return {name: OpenSource(name=name, **entry) for name, entry in entries.items()}


def chosen_sources(names: list[str] | None) -> list[OpenSource]:
    """Return the sources of these names; all sources for no names.

    Raises:
        DataError: There is no such source; the message names the nearest one.
    """
    sources = open_sources()
    for name in names or []:
        if name not in sources:
            raise DataError(
                f"--only {name}: no data set of the open stream{nearest(name, sources)}; it has {', '.join(sources)}"
            )
    return [source for name, source in sources.items() if not names or name in names]
