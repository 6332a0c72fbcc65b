"""Metrics that count words of any script and that the published evaluation lacks: overlap of reports, whole-word closed
accuracy, and corpus BLEU."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mslora_cr.statistics.cluster_robust import Scores

BLEU_ORDER = 4
NgramCounts = tuple[int, ...]
"""Counts of an answer: its n-grams that the truth has, for n = 1..4; its n-grams; its words; the truth's words."""

_ASCII_WORD = re.compile(r"[a-z0-9]+")
DIGITS = r"\d+(?:[.,]\d+)*|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.,])(?P<sign>[-+\u2212]?)(?P<digits>{DIGITS})(?P<unit>(?=[^\W\d_]))?")
_AS_WORD = re.compile(r"\b(?P<sign>minus)?(?P<digits>\d+(?:point\d+)*)\b")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Japanese syllables
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),  # Chinese characters
)
"""Scripts that put no space between words, so a character counts as one."""
_ARTICLES = {"a", "an", "the"}
_OPPOSITE = {"yes": "no", "no": "yes"}


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and the marks upon them, in lower case.

    For texts in ASCII they equal the words of `rouge-score`, which cuts words at every other letter and drops other
    scripts. A text without a letter or digit consists of its signs, split at spaces, so that `+` is a word.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _ASCII_WORD.findall(lowered) or lowered.split()
    spaced = []
    for sign in unicodedata.normalize("NFC", lowered):
        if any(low <= ord(sign) <= high for low, high in _UNSPACED) and sign.isalnum():
            spaced.append(f" {sign}")
        elif sign.isalnum() or unicodedata.category(sign).startswith("M"):
            spaced.append(sign)
        else:
            spaced.append(" ")
    return "".join(spaced).split() or lowered.split()


def plain_number(digits: str) -> str:
    """Return a number without a sign as digits with a point: `1,000` is 1000, `2,50` is 2.5, `.5` is 0.5, `3.0` is 3.

    What has several points, such as a date, is no number, and keeps them.
    """
    plain = digits.replace(",", "") if _THOUSANDS.fullmatch(digits) else digits.replace(",", ".")
    plain = f"0{plain}" if plain.startswith(".") else plain
    return plain.rstrip("0").rstrip(".") if plain.count(".") == 1 else plain


def number_words(text: str) -> str:
    """Return a text in which every number with a sign, a point or a comma is one word of letters and digits.

    So 5 is no part of 3.5, 25 none of 0.25, and 5 is not -5; 1,000 is 1000, 2,5 is 2.5, and 3.0 is 3.
    """
    return _NUMBER.sub(_one_word, text)


def _one_word(number: re.Match[str]) -> str:
    sign = "minus" if number["sign"] in ("-", "\u2212") else ""
    word = sign + plain_number(number["digits"]).replace(".", "point")
    return word if word == number[0] or number["unit"] is None else f"{word} "


def without_number_words(text: str) -> str:
    """Return a text of `number_words` with its numbers in digits."""
    return _AS_WORD.sub(_in_digits, text)


def _in_digits(number: re.Match[str]) -> str:
    return ("-" if number["sign"] else "") + number["digits"].replace("point", ".")


def report_overlap(prediction: str, reference: str) -> tuple[float, float, float]:
    """Return ROUGE-L, token-level recall and SQuAD's F1 of a text, each in [0, 1]; 0 where the reference has no word.

    ROUGE-L is ``2PR / (P + R)``, with P and R the length of the longest common subsequence of words over the
    prediction's and the reference's number of words. Token recall is ROUGE-1's: the reference's words that the
    prediction has, each as often as both have it, over all of the reference's words. SQuAD's F1 counts the words that
    both have in the same way, without articles. Unlike the published F1, it does not count a word five times because
    the prediction says it five times. Sources: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004
    workshop, with the numbers of the `rouge-score` library; Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine
    Comprehension of Text", EMNLP 2016.
    """
    said, expected = words(prediction), words(reference)
    if not said or not expected:
        return 0.0, 0.0, 0.0
    shared = (Counter(said) & Counter(expected)).total()
    longest = lcs_length(said, expected)
    precision, recall = longest / len(said), longest / len(expected)
    rouge_l = 2 * precision * recall / (precision + recall) if longest else 0.0
    return rouge_l, shared / len(expected), _squad_f1(said, expected)


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, in memory that grows with one text, not with their product.

    A row of the usual table is kept as the bits of one number. Source: Hyyrö, "Bit-parallel LCS-length computation
    revisited", AWOCA 2004.
    """
    masks: dict[str, int] = {}
    for position, word in enumerate(one):
        masks[word] = masks.get(word, 0) | 1 << position
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matched = row & masks.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(one) - row.bit_count()


def _squad_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    said, expected = (Counter(_without_articles(text)) for text in (prediction, reference))
    shared = (said & expected).total()
    return 2 * shared / (said.total() + expected.total()) if shared else 0.0


def _without_articles(text: Sequence[str]) -> list[str]:
    """Drop articles unless nothing else is there: `A` may name a choice."""
    return [word for word in text if word not in _ARTICLES] or list(text)


def says(prediction: str, reference: str, normal_prediction: str, normal_reference: str) -> bool:
    """Return whether a closed answer gives its truth in whole words: the truth's words, normalised as the published
    evaluation does, are a run of the answer's, and of yes and no the answer says only one.

    The published closed accuracy looks for letters: it finds `no` in `abnormal`. A truth of which normalising leaves
    nothing, such as the choice `A`, must be the whole answer; an empty truth is never matched.
    """
    truth = words(normal_reference)
    if not truth:
        return bool(words(reference)) and words(prediction) == words(reference)
    said = words(normal_prediction)
    if len(truth) == 1 and _OPPOSITE.get(truth[0]) in said:
        return False
    return f" {' '.join(truth)} " in f" {' '.join(said)} "


def ngram_counts(prediction: str, reference: str) -> NgramCounts:
    """Return the counts of an answer for corpus BLEU, with words split at spaces."""
    said, expected = prediction.split(), reference.split()
    shared, total = [], []
    for order in range(1, BLEU_ORDER + 1):
        ours, theirs = (
            Counter(zip(*(text[start:] for start in range(order)), strict=False)) for text in (said, expected)
        )
        shared.append((ours & theirs).total())
        total.append(ours.total())
    return (*shared, *total, len(said), len(expected))


def corpus_bleu(counts: Scores) -> Scores:
    """Return BLEU of whole sets of answers, in [0, 1]: ``min(1, exp(1 - r/c)) · Π_n p_n^(1/4)`` of summed counts.

    The published `bleu_score` is a mean over answers, in which every answer without a shared 4-gram counts 0. Source:
    Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002.

    Args:
        counts: (sets, 10), sums of `ngram_counts`.

    Returns:
        (sets,).
    """
    shared, total, (said, expected) = counts[:, :4], counts[:, 4:8], counts[:, 8:].T
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.log(shared / total).sum(axis=1) / BLEU_ORDER
        brevity = np.minimum(0.0, 1 - expected / said)
        bleu = np.exp(precisions + brevity)
    return np.where((shared > 0).all(axis=1), bleu, 0.0)


def bleu_influence(counts: Scores) -> Scores:
    """Return how far each answer moves corpus BLEU, to first order: ``BLEU · Σ_k ∂ log BLEU / ∂c_k · c_ik``, with c the
    summed counts and c_i the answer's. The values sum to 0; all are 0 where BLEU is.

    Args:
        counts: (answers, 10), of `ngram_counts`.

    Returns:
        (answers,), in [-1, 1].
    """
    total = counts.sum(axis=0)
    bleu = float(corpus_bleu(total[None])[0])
    if bleu == 0:
        return np.zeros(len(counts))
    slopes = np.concatenate([1 / total[:4], -1 / total[4:8]]) / BLEU_ORDER
    said, expected = total[8:]
    brevity = (expected / said**2, -1 / said) if expected > said else (0.0, 0.0)
    return np.clip(bleu * counts @ np.concatenate([slopes, brevity]), -1.0, 1.0)
