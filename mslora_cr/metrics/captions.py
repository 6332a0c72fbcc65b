"""Scores captions by the COCO evaluation: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr (library `pycocoevalcap`).

METEOR and the tokenizer of the published evaluation are Java programs, which the library includes. Without Java, NLTK
cuts the words, METEOR is left out, and the mean has a name of its own because it is not the published score. Sources:
Chen et al., "Microsoft COCO Captions", arXiv 2015; Vedantam et al., "CIDEr", CVPR 2015; Denkowski and Lavie, "Meteor
Universal", WMT 2014.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mslora_cr.metrics.benchmarks import PUBLISHED
from mslora_cr.statistics.intervals import Scores
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)

BLEU_NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
METEOR, ROUGE_L, CIDER = "METEOR", "caption ROUGE-L", "CIDEr / 10"
"""CIDEr goes up to 10; a tenth of it is a share like the other scores."""
WITHOUT_JAVA = "benchmark without METEOR"
MARKS = {"''", "'", "``", "`", *("-LRB-", "-RRB-", "-LCB-", "-RCB-"), *(".", "?", "!", ",", ":", "-", "--", "...", ";")}
"""Tokens that the COCO evaluation leaves out."""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-"}
"""The COCO evaluation leaves out only brackets in upper case, but its tokenizer writes them in lower case."""

Tokens = dict[int, list[str]]
"""The tokens of an answer, or of each of its references, joined by spaces, by the answer's place."""


def caption_columns(
    answers: Sequence[str], references: Sequence[Sequence[str]], java: bool | None = None
) -> dict[str, list[float]]:
    """Return the scores of a set of captions, each as one value per answer whose mean is the score of the set.

    ROUGE-L and CIDEr are means. BLEU and METEOR are not: their values are ``F + n · ∂F/∂c · (c_i - mean c)``, the score
    of the set to first order in what an answer contributes, so their spread gives the score's interval.

    Args:
        answers: One caption of each image.
        references: The true captions of each image, at least one.
        java: Whether to run Java; None: only if it is found.

    Returns:
        (answers,) by name, each in the unit of 1. `benchmark` is the mean of the seven scores, with all of CIDEr.

    Raises:
        UserError: Java is not installed, or fails.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    has_java = shutil.which("java") is not None
    if java and not has_java:
        raise UserError("METEOR and the tokenizer of captions are Java programs; install Java")
    if java is None:
        java = has_java
        if not java:
            log.warning("there is no Java: METEOR is left out and NLTK cuts the words; that is not the published score")
    said, true = _tokens([[answer] for answer in answers], java), _tokens(references, java)
    columns = _bleu(said, true)
    if java:
        columns[METEOR] = _meteor(said, true)
    columns[ROUGE_L] = np.asarray(Rouge().compute_score(true, said)[1])
    columns[CIDER] = np.asarray(Cider().compute_score(true, said)[1]) / 10
    whole = [values * (10 if name == CIDER else 1) for name, values in columns.items()]
    columns[PUBLISHED if java else WITHOUT_JAVA] = np.mean(whole, axis=0)
    return {name: values.tolist() for name, values in columns.items()}


def _tokens(captions: Sequence[Sequence[str]], java: bool) -> Tokens:
    # A blank line would be lost between two programs; a period is removed from the tokens.
    lines = [[" ".join(caption.split()) or "." for caption in of_image] for of_image in captions]
    if not java:
        return {index: [_nltk_tokens(caption) for caption in of_image] for index, of_image in enumerate(lines)}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenized: Tokens = PTBTokenizer().tokenize(
        {index: [{"caption": caption} for caption in of_image] for index, of_image in enumerate(lines)}
    )
    if {index: len(of) for index, of in tokenized.items()} != {index: len(of) for index, of in enumerate(lines)}:
        raise UserError("Java's tokenizer of captions failed; see its message above")
    return tokenized


def _nltk_tokens(caption: str) -> str:
    from nltk.tokenize import TreebankWordTokenizer

    words = (_BRACKETS.get(word, word) for word in TreebankWordTokenizer().tokenize(caption.lower()))
    return " ".join(word for word in words if word not in MARKS)


def _bleu(said: Tokens, true: Tokens) -> dict[str, Scores]:
    """Return ``B + n B (mean over k of (m_ik/M_k - g_ik/G_k) + brevity)`` by order, of m matches and g n-grams of
    answer i.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for number in said:
        scorer += (said[number][0], true[number])
    values, _ = scorer.compute_score(option="closest")
    counts = scorer.ctest
    lengths = np.array([of["testlen"] for of in counts], dtype=np.float64)
    closest = np.array([_closest(of["reflen"], of["testlen"]) for of in counts], dtype=np.float64)
    matches, ngrams = (np.array([of[name] for of in counts], dtype=np.float64) for name in ("correct", "guess"))
    brevity = np.zeros(len(counts))
    if closest.sum() > lengths.sum() > 0:
        brevity = closest.sum() * lengths / lengths.sum() ** 2 - closest / lengths.sum()
    parts = (_shares(matches) - _shares(ngrams)) * (matches.sum(axis=0) > 0)  # nearly 0, whatever an answer contributes
    return {
        name: value + len(counts) * value * (parts[:, : order + 1].mean(axis=1) + brevity)
        for order, (name, value) in enumerate(zip(BLEU_NAMES, values, strict=True))
    }


def _closest(lengths: Sequence[int], length: int) -> int:
    return min((abs(of - length), of) for of in lengths)[1]


def _shares(counts: Scores) -> Scores:
    """Return each answer's share of the sum, (answers, orders); 0 where the sum is 0."""
    total = counts.sum(axis=0)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def _meteor(said: Mapping[int, list[str]], true: Mapping[int, list[str]]) -> Scores:
    """Return METEOR of the set: it is METEOR's own score of all captions, not their mean, so each answer's value is
    shifted by the remainder."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor: Any = Meteor()
    try:
        whole, each = meteor.compute_score(true, said)
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR's Java program failed: {error}") from None
    values = np.asarray(each, dtype=np.float64)
    return values + (whole - values.mean())
