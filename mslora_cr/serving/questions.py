"""Reads questions from a file or from standard input: plain lines, or JSON lines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mslora_cr.data.records import DataError
from mslora_cr.serving.answering import Answer
from mslora_cr.utils.errors import first_problem
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import STRICT_JSON, explain_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """A question. `json` holds the fields of the line it was read from, to which its answer is added."""

    question: str
    images: tuple[str, ...]
    task: str | None = None
    json: dict[str, object] | None = None
    boxes: tuple[Sequence[float], ...] = ()

    def line(self, answer: Answer) -> str:
        """Return the question's own line with the answer added."""
        result = {
            "answer": None if answer.abstained else answer.text,
            "task": answer.task,
            "stage": answer.stage,
            "banks": list(answer.banks),
        }
        likely = {"probabilities": answer.probabilities} if answer.probabilities else {}
        sure: dict[str, object] = {} if answer.confidence is None else {"confidence": answer.confidence}
        sure |= {"abstained": True} if answer.abstained else {}
        sure |= {} if answer.foreign is None else {"foreign": answer.foreign}
        return json.dumps({**(self.json or {}), **result, **likely, **sure}, ensure_ascii=False)


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)  # Further fields are kept and returned.

    question: Annotated[str, Field(min_length=1)]
    image: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    task: str | None = None
    boxes: list[list[float]] = []


def read_questions(source: str, images: Sequence[str]) -> list[Ask]:
    """Read the questions of a file, or of standard input for `-`; blank lines are skipped.

    Args:
        images: The images of plain lines, and of JSON lines without an image.

    Raises:
        DataError: The file cannot be read, or a line is no question; the message names file, line and field.
    """
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else check_regular(Path(source)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read ({error})") from None
    folder = Path() if source == "-" else Path(source).parent
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [_read(line, f"{name}: line {number}", folder, images) for number, line in lines if line]


def check_asked(questions: Sequence[Ask], images: Sequence[str]) -> None:
    """Check, before the model is loaded, that the questions can be asked; warn of those without an image.

    Args:
        questions: The questions; none if a conversation follows.
        images: The images with which a conversation begins.

    Raises:
        DataError: A question is empty, or an image is not a file.
    """
    for ask in questions:
        if not ask.question.strip():
            raise DataError("a question is empty; type a question")
    for image in dict.fromkeys([*images, *(image for ask in questions for image in ask.images)]):
        if not Path(image).is_file():
            raise DataError(f"{image}: there is no such image file")
    if alone := sum(not ask.images for ask in questions):
        log.warning("%d of %d questions have no image; give one with --image", alone, len(questions))


def _read(line: str, location: str, folder: Path, images: Sequence[str]) -> Ask:
    if not line.startswith("{"):
        return Ask(line, tuple(images))
    try:
        fields = STRICT_JSON.decode(line)
        parsed = _Line.model_validate(fields)
    except ValidationError as error:
        raise DataError(f"{location}: {first_problem(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: {explain_json(error)}") from None
    pictures = [str(folder / image) for image in parsed.image] or list(images)
    return Ask(parsed.question, tuple(pictures), parsed.task, fields, tuple(parsed.boxes))
