"""Whose memory a rank's weights are in; `look` is called in every rank before the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from mslora_cr.distributed.comm import rank
from mslora_cr.models.language import language_linears
from mslora_cr.stream import train as stream


def look(folder: Path) -> None:
    """Write a line for each task to `folder/RANK.jsonl` when its model is about to be partitioned: how many of the
    language model's linear layers there are, and how many of them are still the pages of a file."""
    partition = stream.partition

    def partition_and_note(model: PeftModel, *args: Any) -> None:
        weights = [linear.weight for linear in language_linears(model.get_base_model()).values()]
        pages = written_pages()
        held = sum(not any(start <= weight.data_ptr() < stop for start, stop in pages) for weight in weights)
        with (folder / f"{rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"linears": len(weights), "files": held}) + "\n")
        partition(model, *args)

    stream.partition = partition_and_note


def written_pages() -> list[tuple[int, int]]:
    """Addresses, first and behind the last, of this process's mappings that are its own: of no file, or written to."""
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, stop = (int(part, 16) for part in name.split("-"))
            of_file = values[-1].endswith(".safetensors")
            if not of_file:
                found.append((start, stop))
        elif name == "Anonymous:" and int(values[0]) and of_file:
            found.append((start, stop))
    return found
