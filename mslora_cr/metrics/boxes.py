"""The overlap of boxes."""

from __future__ import annotations

from mslora_cr.data.answers.boxes import Box


def iou(one: Box, other: Box) -> float:
    """Return the intersection over union, in [0, 1]; 0 where both are empty."""
    width = min(one.x2, other.x2) - max(one.x1, other.x1)
    height = min(one.y2, other.y2) - max(one.y1, other.y1)
    shared = max(0.0, width) * max(0.0, height)
    union = one.area + other.area - shared
    return shared / union if union > 0 else 0.0
