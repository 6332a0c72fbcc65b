"""Boxes as answers. Records hold them in pixels; texts spell them as each family of models does.

A record holds `boxes` (left, top, right, bottom in pixels) and the image's `size` (width, height); every `<box>` in its
texts stands for the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, model_validator

BOX = "<box>"
"""The marker that stands for a record's next box in a text."""
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_BETWEEN = r"[\s,;()\[\]]{1,6}"
_BOX = re.compile(rf"[\[(<]\s*({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER})\s*[\])>]")
_BARE = re.compile(rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\.?\s*")

Size = tuple[int, int]
"""Width and height in pixels."""


class Box(NamedTuple):
    """Left, top, right and bottom."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def shares(self, size: Sequence[float]) -> tuple[float, float, float, float]:
        """Return the box in shares of an image's width and height, to four digits."""
        width, height = size
        left, top, right, bottom = (round(value, 4) for value in self.scaled(1 / width, 1 / height))
        return left, top, right, bottom

    def moved(self, x: float, y: float) -> Box:
        return Box(self.x1 + x, self.y1 + y, self.x2 + x, self.y2 + y)

    def scaled(self, x: float, y: float) -> Box:
        return Box(self.x1 * x, self.y1 * y, self.x2 * x, self.y2 * y)


def read_box(text: str) -> Box | None:
    """Return the first box of a text: four numbers in brackets, or nothing but four numbers between commas."""
    match = _BOX.search(text) or _BARE.fullmatch(text)
    return Box(*map(float, match.groups())) if match else None


def pixels(box: Box) -> str:
    """Return a box as scores and answer files spell it."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


class BoxRule(NamedTuple):
    """How a family writes boxes.

    `square` (LLaVA, CoIN): fractions of the square to which the picture is padded. `thousandths` (Qwen2-VL, Qwen3-VL,
    InternVL; all others here): whole thousandths of width and height. `resized` (Qwen2.5-VL): whole pixels of the
    picture as the model sees it; its sides are multiples of `factor`, and its number of pixels lies within the bounds.
    `pixels`: pixels of the picture itself.
    """

    kind: Literal["square", "thousandths", "resized", "pixels"]
    factor: int = 28
    least_pixels: int = 0
    most_pixels: int = 0

    def write(self, box: Box, size: Size) -> str:
        """Return a box in pixels as the model must write it. `read` returns it to within a pixel for pictures of up to
        2,000 pixels a side."""
        if self.kind == "square":
            side, x, y = _padding(size)
            return "[" + ", ".join(f"{value / side:.4f}" for value in box.moved(x, y)) + "]"
        width, height = self._seen(size)
        return "[" + ", ".join(str(round(value)) for value in box.scaled(width / size[0], height / size[1])) + "]"

    def read(self, text: str, size: Size) -> Box | None:
        """Return the first box of an answer in pixels; None where there is none."""
        box = read_box(text)
        if box is None:
            return None
        if self.kind == "square":
            side, x, y = _padding(size)
            return box.scaled(side, side).moved(-x, -y)
        width, height = self._seen(size)
        return box.scaled(size[0] / width, size[1] / height)

    def _seen(self, size: Size) -> Size:
        if self.kind == "pixels":
            return size
        if self.kind == "thousandths":
            return 1000, 1000
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = smart_resize(size[1], size[0], self.factor, self.least_pixels, self.most_pixels)
        return int(width), int(height)


PIXELS = BoxRule("pixels")


def _padding(size: Size) -> tuple[int, float, float]:
    """Return the side of the square, and the distance of the picture from its left and upper edge."""
    side = max(size)
    return side, (side - size[0]) / 2, (side - size[1]) / 2


def rule_of(processor: Any) -> BoxRule:
    """Return the rule of a model's processor, by its class."""
    name = type(processor).__name__
    if name.startswith("Llava"):
        return BoxRule("square")
    if name.startswith("Qwen2_5_VL"):
        images = processor.image_processor
        size = images.size
        return BoxRule(
            "resized", images.patch_size * images.merge_size, int(size["shortest_edge"]), int(size["longest_edge"])
        )
    return BoxRule("thousandths")


def _boxes(value: Any) -> tuple[Box, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("should be a list of boxes, each [left, top, right, bottom] in pixels")
    for box in value:
        numbers = isinstance(box, list | tuple) and all(
            isinstance(one, int | float) and not isinstance(one, bool) for one in box
        )
        if not numbers or len(box) != 4:
            raise ValueError("should be a list of boxes, each [left, top, right, bottom] in pixels")
    return tuple(Box(*map(float, box)) for box in value)


def _size(value: Any) -> Size | None:
    if value is None:
        return None
    whole = isinstance(value, list | tuple) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if not whole or len(value) != 2 or min(value) < 1:
        raise ValueError("should be [width, height] in pixels")
    return value[0], value[1]


class Boxed(BaseModel):
    """A record that may have boxes."""

    boxes: Annotated[tuple[Box, ...], BeforeValidator(_boxes)] = ()
    """The boxes of a question's text, or of a conversation. In a true answer they are written out, in pixels."""
    size: Annotated[Size | None, BeforeValidator(_size)] = None
    """The size of the image that the boxes are in."""

    @model_validator(mode="before")
    @classmethod
    def _place_boxes(cls, value: Any) -> Any:
        """Check the boxes, and write those of a question's true answers into these answers."""
        if not isinstance(value, Mapping) or not value.get("boxes"):
            return value
        boxes, size = _boxes(value["boxes"]), _size(value.get("size"))
        if size is None:
            raise ValueError("field 'size': boxes need the image's [width, height]")
        _check_inside(boxes, size)
        texts = _texts(value)
        if (marks := sum(text.count(BOX) for text in texts)) != len(boxes):
            raise ValueError(f"field 'boxes': {len(boxes)} boxes for {marks} marks {BOX}")
        if "gt" not in value:
            return value
        inside = str(value.get("text", "")).count(BOX)
        rest = iter(boxes[inside:])
        truths = [_filled(text, map(pixels, rest)) for text in texts[1:]]
        return {**value, "gt": truths, "boxes": [[*box] for box in boxes[:inside]]}


def _texts(value: Mapping[str, Any]) -> list[str]:
    """Return the texts of a record that may have marks, in order: the question first, then its truths."""
    if "gt" in value:
        truths = value["gt"] if isinstance(value["gt"], list | tuple) else [value["gt"]]
        return [str(value.get("text", "")), *map(str, truths)]
    turns = value.get("conversations") or ()
    return [str(turn.get("value", "")) for turn in turns if isinstance(turn, Mapping)]


def filled(texts: Sequence[str], record: Boxed, rule: BoxRule) -> list[str]:
    """Return a record's texts with its boxes as the model writes them; unchanged where it has none."""
    if not record.boxes or record.size is None:
        return list(texts)
    return _written(texts, record.boxes, record.size, rule)


def filled_question(question: str, boxes: Sequence[Sequence[float]], size: Size | None, rule: BoxRule) -> str:
    """Return a question with its boxes as the model writes them; unchanged where no box is given.

    Args:
        question: The question, with a mark `<box>` for each box.
        boxes: Left, top, right and bottom in pixels.
        size: Of the picture that they are in.
        rule: The model's.

    Raises:
        ValueError: There is no picture, a box is not in it, or there are not as many marks as boxes.
    """
    if not boxes:
        return question
    if size is None:
        raise ValueError("boxes need a picture that they are in")
    _check_inside(given := _boxes(boxes), size)
    if (marks := question.count(BOX)) != len(given):
        raise ValueError(f"{len(given)} boxes for {marks} marks {BOX} in the question")
    [text] = _written([question], given, size, rule)
    return text


def _written(texts: Sequence[str], boxes: Sequence[Box], size: Size, rule: BoxRule) -> list[str]:
    written = (rule.write(box, size) for box in boxes)
    return [_filled(text, written) for text in texts]


def _check_inside(boxes: Sequence[Box], size: Size) -> None:
    for box in boxes:
        if not (0 <= box.x1 < box.x2 <= size[0] and 0 <= box.y1 < box.y2 <= size[1]):
            raise ValueError(f"field 'boxes': {[*box]} is no box inside an image of {size[0]} × {size[1]}")


def _filled(text: str, written: Iterator[str]) -> str:
    first, *parts = text.split(BOX)
    return first + "".join(next(written) + part for part in parts)


def iou(one: Box, other: Box) -> float:
    """Return the intersection over union, in [0, 1]; 0 where both are empty."""
    width = min(one.x2, other.x2) - max(one.x1, other.x1)
    height = min(one.y2, other.y2) - max(one.y1, other.y1)
    shared = max(0.0, width) * max(0.0, height)
    union = one.area + other.area - shared
    return shared / union if union > 0 else 0.0
