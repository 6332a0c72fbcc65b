"""Reads questions as public benchmarks write them: one JSON list of `question_id`, `image`, `text` and `answer`.

The layouts are those of CoIN, UCIT and MLLM-CL; what their runners append to a question is appended here.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from pydantic import Field

from mslora_cr.config.benchmarks import Benchmark
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.json_list import Item, ListReader
from mslora_cr.data.record_fields import Images, Text
from mslora_cr.data.records import DataError, TestRecord, TestRecords
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import JsonError, decode_json

YES_NO = ("Yes", "No")
SINGLE_WORD = " Answer the question with a single word (or phrase)."
ONLY_YES_NO = " Only answer with yes or no directly."
LETTER = " Answer with the given letter directly, e.g., A, B, C, D."
WITH_REFERENCES: tuple[Benchmark, ...] = ("textvqa", "captions")
"""Benchmarks whose scorers read true answers from a separate file."""


class ListedQuestion(TestRecord):
    """A question of a benchmark's list; it may be about no image."""

    __test__: ClassVar[bool] = False

    images: Images = Field(default=(), alias="image")
    benchmark: Benchmark | None = None
    suffix: Text = ""
    """The text that the benchmark's runner appends to the question."""

    @property
    def question(self) -> str:
        return super().question + self.suffix


class ListedQuestions(TestRecords):
    """A benchmark's list of questions.

    Args:
        benchmark: The benchmark whose layout and scorer apply.
        references: The file of further true answers: TextVQA's annotations, or captions in COCO's layout, whose image
            ids count the questions from 1.
        problems: Collects what is wrong with single records; without it, the first problem raises.

    Raises:
        DataError: As `TestRecords`, or the references are missing, malformed or of other questions.
    """

    __test__ = False
    _model = ListedQuestion

    def __init__(
        self,
        path: Path,
        benchmark: Benchmark | None = None,
        references: Path | None = None,
        problems: list[str] | None = None,
    ) -> None:
        self._benchmark = benchmark
        self._positions: dict[int, int] = {}
        if benchmark in WITH_REFERENCES and references is None:
            raise DataError(
                f"{path}: the scorer {benchmark!r} reads true answers from a file of its own; name it as `references` "
                "of the data set"
            )
        self._references = _references(references, benchmark) if references and benchmark else None
        super().__init__(path, problems)
        if benchmark == "captions" and self._references is not None and len(self._references) < len(self):
            raise DataError(
                f"{references}: captions of {len(self._references)} images, {len(self)} questions in {path}"
            )

    def _items(self, file: BinaryIO, hasher: hashlib._Hash) -> Iterator[Item]:
        for number, item in enumerate(ListReader(self.path, file, hasher).items()):
            self._positions[item[0]] = number
            yield item

    def _record(self, value: Any, start: int) -> TestRecord:
        question = dict(value)
        if "gt" not in question:
            question["gt"] = _truth(value, self._benchmark)
        if self._references is not None:
            key = str(self._positions[start] + 1 if self._benchmark == "captions" else value.get("question_id"))
            question["gt"] = self._references.get(key) or question["gt"]
        truth = question["gt"][0] if isinstance(question["gt"], list) and question["gt"] else question["gt"]
        question.setdefault("answer_type", "CLOSED" if _is_closed(truth) else "OPEN")
        return ListedQuestion.model_validate(
            {name: question[name] for name in question if name in KNOWN}
            | {"benchmark": self._benchmark, "suffix": _suffix(self._benchmark, truth)}
        )

    def location(self, index: int) -> str:
        return f"record {self._positions[self._starts[index]]}"


KNOWN = {field.alias or name for name, field in TestRecord.model_fields.items()}


def _truth(value: Mapping[str, Any], benchmark: Benchmark | None) -> Any:
    """A number is read as written; Grounding's truth is a box."""
    truth = value.get("answer_bbox", value.get("answer")) if benchmark == "grounding" else value.get("answer")
    written = isinstance(truth, list) if benchmark == "grounding" else isinstance(truth, int | float)
    return json.dumps(truth) if written else truth


def _is_closed(truth: Any) -> bool:
    said = final_answer(truth).text.strip(" .") if isinstance(truth, str) else ""
    return said.lower() in ("yes", "no") or (len(said) == 1 and said.isalpha())


def _suffix(benchmark: Benchmark | None, truth: Any) -> str:
    if benchmark == "pvqa":
        return SINGLE_WORD
    if benchmark == "finvis":
        return ONLY_YES_NO if truth in YES_NO else LETTER
    return ""


def _references(path: Path, benchmark: Benchmark) -> dict[str, list[str]]:
    """Return further true answers: for TextVQA by question ID, for captions by the number of the question, from 1."""
    try:
        content = decode_json(check_regular(path).read_bytes())
        references: dict[str, list[str]] = defaultdict(list)
        if benchmark == "captions":
            for entry in content["annotations"]:
                references[str(entry["image_id"])].append(_text(entry["caption"]))
        else:
            for entry in content["data"]:
                references[str(entry["question_id"])] += map(_text, entry["answers"])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (JsonError, KeyError, TypeError) as error:
        layout = "a COCO file (`annotations` with `image_id` and `caption`)" if benchmark == "captions" else (
            "TextVQA's annotations (`data` with `question_id` and `answers`)"
        )  # fmt: skip
        raise DataError(f"{path}: expected {layout}: {error}") from None
    return dict(references)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
