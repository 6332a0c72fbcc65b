"""The scorers of CoIN, UCIT and MLLM-CL: as published and, where a published scorer is wrong, a corrected one beside
it.

Each rule gives an answer's score in [0, 1]. Sources: the files `eval_*.py` of github.com/zackschen/CoIN,
github.com/Ghy0501/HiDe-LLaVA (UCIT) and github.com/bjzhb666/MLLM-CL; facts are taken from them, not code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from mslora_cr.config.benchmarks import Benchmark
from mslora_cr.data.answers.boxes import iou, read_box
from mslora_cr.metrics.published import gives, normalize_answer

PUBLISHED, CORRECTED = "benchmark", "benchmark corrected"
"""Names of the metrics."""
LETTERS = "ABCDE"
MOST_IOU_MISSED = 0.5
"""A box counts as found if it overlaps the true box by more than this."""
UNANSWERABLE = "Unanswerable"
_MARKED = re.compile(rf"\(([{LETTERS}])\)|\b(?:is|option|choice)\b:? ([{LETTERS}])\b")
EXACT_SCIENCE = ("AI2D", "TQA", "VQA", "SciVerse")
"""Sources of MLLM-CL's science questions that are scored by equality; the name of an image begins with its source."""
STATES = "Which states"


class BenchmarkAnswer(NamedTuple):
    """An answer to a benchmark's question.

    Attributes:
        text: The final part of the answer, without outer white space.
        truths: Accepted answers: one, or TextVQA's ten.
        question: The question's text, without what the runner appends.
        image: The name of its first image; empty without one.
    """

    text: str
    truths: Sequence[str]
    question: str = ""
    image: str = ""

    @property
    def truth(self) -> str:
        return self.truths[0]


Rule = Callable[[BenchmarkAnswer], float]


def published_score(benchmark: Benchmark, answer: BenchmarkAnswer) -> float:
    """Return an answer's score in [0, 1], as the benchmark's own scorer gives it."""
    return _RULES[benchmark][0](answer)


def corrected_score(benchmark: Benchmark, answer: BenchmarkAnswer) -> float | None:
    """Return the score without the scorer's faults; None where no fault is known."""
    corrected = _RULES[benchmark][1]
    return None if corrected is None else corrected(answer)


def _letter_published(answer: BenchmarkAnswer) -> float:
    """CoIN's ScienceQA takes the whole answer, or `B. …`, or the first word of one character, in upper case.

    The fault: in `This is a mammal, B` that word is the article.
    """
    text = answer.text
    if text in [*LETTERS]:
        return float(text == answer.truth)
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return float(text[0] == answer.truth)
    alone = re.search(r"\b\w\b", text)
    return float(alone is not None and alone[0].upper() == answer.truth)


def _letter_corrected(answer: BenchmarkAnswer) -> float:
    """Return the whole answer, or the one letter that is marked (`B.`, `(B)`, `B:`, `answer is B`)."""
    text = answer.text.strip()
    if re.fullmatch(rf"\(?([{LETTERS}])[).:]*", text, re.IGNORECASE):
        return float(text.strip("().:").upper() == answer.truth)
    opening = re.match(rf"\(?([{LETTERS}])[).:]", text)
    letters = {opening[1]} if opening else {match[1] or match[2] for match in _MARKED.finditer(text)}
    return float(letters == {answer.truth})


def soft_accuracy(answer: BenchmarkAnswer) -> float:
    """Return VQA accuracy: the mean over ten annotators of ``min(1, matches among the other nine / 3)``.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015. Answers are normalised as TextVQA's evaluation
    does (Singh et al., CVPR 2019): commas and question marks are removed, `'s` is split off, and the rest follows VQA.
    """
    said = _evalai(answer.text)
    annotators = [_evalai(truth) for truth in answer.truths]
    matches = annotators.count(said)
    others = [matches - (annotator == said) for annotator in annotators]
    return sum(min(1.0, count / 3) for count in others) / len(others) if matches else 0.0


def _evalai(text: str) -> str:
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_answer(lowered.replace("\n", " ").replace("\t", " ").strip())


def _either_way(answer: BenchmarkAnswer) -> float:
    """CoIN's ImageNet looks for the truth in the answer or the answer in the truth, letter by letter.

    The faults: an empty answer is right, and so is `cat` for `caterpillar`.
    """
    return float(answer.truth in answer.text or answer.text in answer.truth)


def _words(answer: BenchmarkAnswer) -> float:
    """Return whether the truth's words are a run of the answer's."""
    return float(gives(answer.text, answer.truth))


def _gqa(answer: BenchmarkAnswer) -> float:
    return float(answer.text.rstrip(".").lower() == answer.truth)


def _upper(answer: BenchmarkAnswer) -> float:
    return float(answer.text.upper() == answer.truth.upper())


def _lower(answer: BenchmarkAnswer) -> float:
    return float(answer.text.lower() == answer.truth.lower())


def _answerable(rule: Rule) -> Rule:
    """The fault: an answer with this word counts as wrong even where the word is the truth."""

    def published(answer: BenchmarkAnswer) -> float:
        return 0.0 if UNANSWERABLE in answer.text else rule(answer)

    return published


def _grounding_published(answer: BenchmarkAnswer) -> float:
    """CoIN's Grounding takes the IoU over a half of four fractions of the padded square.

    The fault: the first and the last character are cut off once the brackets are gone, so `[1.0, …, 0.75]` is read as
    `.0` and `0.7`.
    """
    truth = read_box(answer.truth)
    try:
        said = [float(part) for part in answer.text.replace("[", "").replace("]", "")[1:-1].split(",")]
    except ValueError:
        return 0.0
    if truth is None or len(said) != 4:
        return 0.0
    return float(_signed_iou(said, truth) > MOST_IOU_MISSED)


def _signed_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the overlap as published: a box whose corners are in the wrong order has a negative area or side."""
    width, height = (max(0.0, min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis])) for axis in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def _grounding_corrected(answer: BenchmarkAnswer) -> float:
    said, truth = read_box(answer.text), read_box(answer.truth)
    return float(said is not None and truth is not None and iou(said, truth) > MOST_IOU_MISSED)


def _ai2d(answer: BenchmarkAnswer) -> float:
    """MLLM-CL's remote sensing and driving look for a truth of several words letter by letter. They look for a truth of
    one word, in an answer of several, with a space before it or a space, period or comma behind it.

    The fault: ` a` is found in `an apple`, and `no ` in `piano music`.
    """
    said, truth = answer.text.lower(), answer.truth.lower()
    if " " in truth:
        return float(truth in said)
    truth = truth.replace(".", "")
    if " " in said:
        return float(any(part in said for part in (f" {truth}", f"{truth} ", f"{truth}.", f"{truth},")))
    return float(truth in said)


def _contained(answer: BenchmarkAnswer) -> float:
    """MLLM-CL's medicine. The fault: `no` is found in `normal`."""
    return float(answer.truth.lower() in answer.text.lower())


def _science(answer: BenchmarkAnswer) -> float:
    """MLLM-CL's science takes equality; for MapQA, the share of true states that are listed; otherwise the truth in the
    answer.

    The faults: a list is not separated from the space behind its commas, and states too many cost nothing.
    """
    said, truth = answer.text.lower(), answer.truth.lower()
    if PurePosixPath(answer.image).name.split("_")[0] in EXACT_SCIENCE:
        return float(said == truth)
    if STATES in answer.question:
        listed, wanted = said.split(","), truth.split(",")
        return sum(state in listed for state in wanted) / len(wanted)
    return float(truth in said)


def _science_corrected(answer: BenchmarkAnswer) -> float:
    """Score states by the F1 of the two sets, equality without outer spaces and a period, and the rest in whole
    words."""
    if PurePosixPath(answer.image).name.split("_")[0] in EXACT_SCIENCE:
        return float(_plain(answer.text) == _plain(answer.truth))
    if STATES in answer.question:
        listed, wanted = (Counter({_plain(state) for state in text.split(",")}) for text in (answer.text, answer.truth))
        return 2 * (listed & wanted).total() / (listed.total() + wanted.total())
    return _words(answer)


def _plain(text: str) -> str:
    return text.strip(" .").lower()


def _finance(answer: BenchmarkAnswer) -> float:
    """MLLM-CL's finance. The fault: spaces and periods are removed from the answer alone, so a truth with one is never
    matched."""
    return float(answer.text.lower().replace(" ", "").replace(".", "") == answer.truth.lower())


def _finance_corrected(answer: BenchmarkAnswer) -> float:
    said, truth = (text.lower().replace(" ", "").replace(".", "") for text in (answer.text, answer.truth))
    return float(said == truth)


_RULES: dict[Benchmark, tuple[Rule, Rule | None]] = {
    "scienceqa": (_letter_published, _letter_corrected),
    "textvqa": (soft_accuracy, None),
    "imagenet": (_either_way, _words),
    "gqa": (_gqa, None),
    "exact": (_upper, None),
    "grounding": (_grounding_published, _grounding_corrected),
    "ocrvqa": (_answerable(_lower), _lower),
    "ai2d": (_answerable(_ai2d), _words),
    "pvqa": (_answerable(_contained), _words),
    "sci": (_answerable(_science), _science_corrected),
    "finvis": (_answerable(_finance), _finance_corrected),
}
"""Scorers by benchmark; captions are scored together (`metrics.captions`)."""
