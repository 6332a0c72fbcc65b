"""Reads boxes in answers, and computes their overlap."""

from __future__ import annotations

import re
from typing import NamedTuple

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_BOX = re.compile(rf"[\[(<]\s*({_NUMBER})\s*[, ]\s*({_NUMBER})\s*[, ]\s*({_NUMBER})\s*[, ]\s*({_NUMBER})\s*[\])>]")
_BARE = re.compile(rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\.?\s*")


class Box(NamedTuple):
    """Left, top, right and bottom, in the answers' unit."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)


def read_box(text: str) -> Box | None:
    """The first box of a text: four numbers in brackets, or four numbers between commas and nothing else."""
    found = _BOX.search(text) or _BARE.fullmatch(text)
    return Box(*map(float, found.groups())) if found else None


def iou(one: Box, other: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where both are empty."""
    width = min(one.x2, other.x2) - max(one.x1, other.x1)
    height = min(one.y2, other.y2) - max(one.y1, other.y1)
    shared = max(0.0, width) * max(0.0, height)
    union = one.area + other.area - shared
    return shared / union if union > 0 else 0.0
