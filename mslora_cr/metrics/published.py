"""Text metrics of generated answers: those of the published MSLoRA-CR evaluation, and further ones.

For the published ones an answer and its truth are normalised the way the VQA challenge normalises answers
(Antol et al., "VQA: Visual Question Answering", ICCV 2015), in the variant that LLaVA-Med's evaluation uses.
Everything here is a pure function of the texts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.records import AnswerType
from mslora_cr.metrics.words import NgramCounts, ngram_counts, number_words, report_overlap, says

HIT_RECALL = 0.5
"""An open answer with more than this recall counts as a hit in `hit.csv`; it enters no score."""

BLEU_WEIGHTS = {
    "bleu_score": (0.25, 0.25, 0.25, 0.25),
    "bleu_score_1": (1.0, 0.0, 0.0, 0.0),
    "bleu_score_2": (0.0, 1.0, 0.0, 0.0),
    "bleu_score_3": (0.0, 0.0, 1.0, 0.0),
}
"""N-gram weights by published name: `bleu_score_n` is the n-gram precision alone times the brevity
penalty."""

OVERLAPS = ("f1 score", "precision", "recall")
"""Published names of `Overlap`'s fields, in its order."""

ADDED = ("rouge-l", "token recall", "squad f1")
"""Metrics of open answers that the published evaluation does not have; they are not in `metrics.txt`."""
ADDED_CLOSED = "whole-word accuracy"
"""The added metric of closed answers."""

CACHED_CHARACTERS = 2_000
"""Scores of an answer and its truth are kept for reuse if both together are at most this long."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
STRIPPED_PERIODS = 32
"""At most this many periods are removed from a text: the published code hands `re.UNICODE`, which is 32, to the
argument that limits how many are replaced. Some reports have more sentences than that."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTED.split()
    for index, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry of the challenge's list that runs the other way
"""Contractions that lost one apostrophe, mapped to the contraction."""
_REWRITTEN = _NUMBERS | _CONTRACTIONS


class ScorableAnswer(Protocol):
    """An answer to score; `text` and `gt` may be any JSON value and are read as `str` prints them."""

    @property
    def text(self) -> object: ...
    @property
    def gt(self) -> object: ...
    @property
    def answer_type(self) -> AnswerType: ...


class Overlap(NamedTuple):
    """Word overlap of an answer with its truth, each in [0, 1]."""

    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class RowScore:
    """The scores of one answer; a hit contains the truth (closed) or `HIT_RECALL` of its words (open)."""

    answer_type: AnswerType
    prediction: str
    reference: str
    exact: bool
    hit: bool
    overlap: Overlap
    bleu: tuple[float, ...] | None
    """Scores in the order of `BLEU_WEIGHTS`; None for closed questions."""
    added: tuple[float, ...] | None
    """Scores in the order of `ADDED`; None for closed questions."""
    ngrams: NgramCounts | None
    """None for closed questions."""
    said: bool | None
    """Whether a closed answer gives its truth in whole words; None for open questions."""

    def by_metric(self) -> dict[str, float | None]:
        """Return the answer's score in each metric, in [0, 1]; None where a metric is not for its kind of question."""
        opened = self.answer_type == "OPEN"
        return {
            "exact match score": float(self.exact),
            **(dict(zip(OVERLAPS, self.overlap, strict=True)) if opened else dict.fromkeys(OVERLAPS)),
            **(dict(zip(BLEU_WEIGHTS, self.bleu, strict=True)) if self.bleu else dict.fromkeys(BLEU_WEIGHTS)),
            "close accuracy": None if opened else float(self.hit),
            **(dict(zip(ADDED, self.added, strict=True)) if self.added else dict.fromkeys(ADDED)),
            ADDED_CLOSED: None if self.said is None else float(self.said),
        }


@dataclass(frozen=True)
class Scores:
    """The scores of many answers, one by one and on average.

    Open questions alone give F1 to BLEU, closed questions alone give the closed accuracy; a metric with no
    row of its kind is left out, so a file without answers has no metrics at all.
    """

    rows: tuple[RowScore, ...]
    benchmark: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Every answer's score, by metric of a public benchmark's scorer or of boxes; None where it has none."""
    typed: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Further columns, from `metrics.typed`."""

    @cached_property
    def columns(self) -> dict[str, Sequence[float | None]]:
        """Return every answer's score in [0, 1], in order, by metric; None where a metric is not for its kind of
        question."""
        by_row = [row.by_metric() for row in self.rows]
        scored = {name: [scores[name] for scores in by_row] for name in (by_row[0] if by_row else ())}
        return scored | ({**self.benchmark, **self.typed} if by_row else {})

    @property
    def metrics(self) -> dict[str, float]:
        """Return the averages in percent, in the published order, under the published names."""
        return {name: average for name, average in self._averages.items() if name not in self._added_names}

    @property
    def added(self) -> dict[str, float]:
        """Return the averages of `ADDED`, `ADDED_CLOSED`, `benchmark` and `typed`, in percent."""
        return {name: average for name, average in self._averages.items() if name in self._added_names}

    @property
    def _added_names(self) -> set[str]:
        return {*ADDED, ADDED_CLOSED, *self.benchmark, *self.typed}

    @cached_property
    def _averages(self) -> dict[str, float]:
        defined = {name: [score for score in column if score is not None] for name, column in self.columns.items()}
        return {name: fmean(scores) * 100 for name, scores in defined.items() if scores}

    @property
    def open(self) -> int:
        """Number of open questions."""
        return sum(row.answer_type == "OPEN" for row in self.rows)

    @property
    def closed(self) -> int:
        """Number of closed questions."""
        return len(self.rows) - self.open


def normalize_answer(text: str) -> str:
    """Return lower-cased words without punctuation and articles, numbers up to ten as digits, apostrophes restored.

    A punctuation mark vanishes if somewhere in the text it is next to a space, or if the text has a comma between
    digits; elsewhere it turns into a space. So `T2-weighted` becomes `t2 weighted`, but `T2-weighted -` becomes
    `t2weighted`.
    """
    joined = "," in text and _COMMA_IN_NUMBER.search(text) is not None
    marks = {
        mark: "" if joined or f"{mark} " in text or f" {mark}" in text else " " for mark in PUNCTUATION if mark in text
    }
    for mark, replacement in marks.items():
        text = text.replace(mark, replacement)
    if "." in text:
        text = _PERIOD.sub("", text, count=STRIPPED_PERIODS)
    return " ".join([_REWRITTEN.get(word, word) for word in text.lower().split() if word not in _ARTICLES])


def token_f1(prediction: str, reference: str) -> Overlap:
    """Compute the overlap of two texts' words, once normalised, as the published evaluation counts it.

    With c(w) and r(w) the counts of a word in prediction and reference: TP = Σ c(w) over words in both, FP = Σ c(w)
    over words of the prediction alone, FN = Σ r(w) over words of the reference alone; precision = TP / (TP + FP),
    recall = TP / (TP + FN). Unlike the F1 of SQuAD (Rajpurkar et al., EMNLP 2016), a shared word counts as often as the
    prediction says it. All are 0 if no word is shared.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    in_prediction, in_reference = set(predicted), set(expected)
    shared = sum([word in in_reference for word in predicted])
    if shared == 0:
        return Overlap(0.0, 0.0, 0.0)
    missed = sum([word not in in_prediction for word in expected])
    precision, recall = shared / len(predicted), shared / (shared + missed)
    return Overlap(2 * precision * recall / (precision + recall), precision, recall)


def score_answers(answers: Iterable[ScorableAnswer]) -> Scores:
    """Score answers one by one."""
    with warnings.catch_warnings():
        # NLTK warns of every answer without a shared 4-gram; most answers of a word or two have none.
        warnings.filterwarnings("ignore", module="nltk")
        return Scores(tuple(_score_row(answer) for answer in answers))


def _score_row(answer: ScorableAnswer) -> RowScore:
    """Score one answer by its `final_answer`, and its truth likewise; a leading or embedded `assistant:` of the chat
    format is removed from the answer's text."""
    said = final_answer(str(answer.text)).text.lower().replace("assistant:", "").strip()
    truth = final_answer(str(answer.gt)).text
    prediction = normalize_answer(said)
    reference = normalize_answer(truth.lower())
    # The published code normalises a second time before it counts words, and so does token_f1. That matters only for
    # texts of more than STRIPPED_PERIODS periods.
    overlap = token_f1(prediction, reference)
    closed = answer.answer_type == "CLOSED"
    return RowScore(
        answer_type=answer.answer_type,
        prediction=prediction,
        reference=reference,
        exact=prediction == reference,
        hit=reference in prediction if closed else overlap.recall > HIT_RECALL,
        overlap=overlap,
        bleu=None if closed else _remembered(_bleu, prediction, reference),
        added=None if closed else _remembered(report_overlap, said, truth),
        ngrams=None if closed else _remembered(ngram_counts, prediction, reference),
        said=gives(said, truth) if closed else None,
    )


def gives(answer: str, truth: str) -> bool:
    """Return whether a closed answer gives its truth in whole words (`says`), with each number as one word: the
    published normalisation cuts numbers at their marks."""
    return says(answer, truth, _with_number_words(answer), _with_number_words(truth))


@lru_cache(maxsize=1 << 12)  # Closed answers and their truths repeat.
def _with_number_words(text: str) -> str:
    return normalize_answer(number_words(text.lower()))


def _remembered(score: Callable[[str, str], tuple[float, ...]], prediction: str, reference: str) -> Any:
    """Return a score of two texts; the score of short texts, which repeat, is kept."""
    return (_cached if len(prediction) + len(reference) <= CACHED_CHARACTERS else _of)(score, prediction, reference)


def _of(score: Callable[[str, str], tuple[float, ...]], prediction: str, reference: str) -> tuple[float, ...]:
    return score(prediction, reference)


_cached = lru_cache(maxsize=1 << 15)(_of)


def _bleu(prediction: str, reference: str) -> tuple[float, ...]:
    """Return sentence BLEU (Papineni et al., ACL 2002), unsmoothed, under every weighting of `BLEU_WEIGHTS`."""
    from nltk.translate.bleu_score import sentence_bleu  # NLTK takes a second to import, and only open answers need it

    scores = sentence_bleu([reference.split()], prediction.split(), weights=list(BLEU_WEIGHTS.values()))
    return tuple(float(score) for score in scores)
