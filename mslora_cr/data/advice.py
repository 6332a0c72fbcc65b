"""Advice for common mistakes: files in the format of another program, or under another name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMATS = "docs/how-to/data.md has the formats"


def missing_annotations(path: Path) -> str:
    """Return advice for a missing `train.json` or `test.jsonl`; empty if there is none."""
    folder = path.parent
    if not folder.is_dir():
        return (
            "; `mslora-cr data download` fetches the published annotations, `bash scripts/link_assets.sh` links those "
            "you have"
        )
    files = sorted(folder.iterdir())
    if tables := [file.name for file in files if file.suffix.lower() in (".csv", ".tsv", ".xlsx", ".parquet")]:
        return f"; {tables[0]} is next to it: `mslora-cr data convert` makes a data set of its rows"
    other = [file.name for file in files if file.suffix.lower() in (".json", ".jsonl")]
    return f"; {', '.join(other[:3])} next to it: rename what belongs here, {FORMATS}" if other else ""


def other_record(value: Mapping[str, Any]) -> str:
    """Return advice for a record in another program's format."""
    turns = value.get("conversations", value.get("messages", value.get("conversation")))
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, Mapping) and ("role" in first or "content" in first):
        return (
            '; this is the form of chat messages: write {"from": "human" or "gpt", "value": …} for {"role": …, '
            '"content": …}, under "conversations", with <image> in the first question'
        )
    if isinstance(first, Mapping) and first.get("from") in ("user", "assistant", "system", "bot", "chatgpt"):
        return '; this is ShareGPT\'s form: "from" is "human" or "gpt" here, and a system text is left out'
    if "question" in value and "answer" in value:
        return f"; question and answer must become a conversation, {FORMATS}"
    return ""


def says_nothing(truth: str) -> bool:
    """Return whether nothing remains of a true answer without punctuation and articles, which the published scores
    remove: every answer contains nothing, so any would count as right."""
    return not set(re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!.]", " ", truth.lower()).split()) - {"a", "an", "the"}


def begins_as_dicom(path: Path) -> bool:
    """Return whether a regular file is DICOM's, by its magic bytes."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


DICOM = "a DICOM file, which needs a window to be drawn: `mslora-cr data convert` draws it as a viewer does"
