import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu

from mslora_cr.metrics.published import Overlap, normalize_answer, score_answers, token_f1
from mslora_cr.metrics.words import corpus_bleu, ngram_counts, report_overlap, words

GOLDEN = Path(__file__).parent.parent / "golden" / "metrics"


def answer(text, gt, answer_type="OPEN"):
    return SimpleNamespace(text=text, gt=gt, answer_type=answer_type)


@pytest.mark.parametrize("name", ["closed", "mixed", "open"])
def test_golden_scores_and_rows(name):
    lines = (GOLDEN / f"{name}.answers.jsonl").read_text(encoding="utf-8").splitlines()
    expected = json.loads((GOLDEN / f"{name}.expected.json").read_text(encoding="utf-8"))

    scores = score_answers(SimpleNamespace(**json.loads(line)) for line in lines)

    assert list(scores.metrics) == list(expected["table"])
    assert scores.metrics == pytest.approx(expected["table"], rel=1e-12)
    found = [(row.prediction, row.reference, *row.overlap) for row in scores.rows]
    assert found == [tuple(row[key] for key in ("pred", "gt", "f1", "precision", "recall")) for row in expected["rows"]]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Left Lung.", "left lung"),
        ("t2-weighted", "t2 weighted"),
        ("t2-weighted - left", "t2weighted left"),  # one mark beside a space removes all of its kind
        ("1,234 left/right", "1234 leftright"),  # a comma between digits does so for every mark
        ("3.5 cm. 2.", "3.5 cm 2"),
        ("none of three", "0 of 3"),
        ("eleven", "eleven"),
        ("isnt the Ten couldntve couldnt've", "isn't 10 couldntve couldn't've"),
        ("twas yall'dve y'all'dve 'ows'at", "'twas yall'dve y'all'd've 'ow's'at"),
        ("somebody'd shed", "somebodyd shed"),
        ("H&E 50% : ok", "h&e 50% : ok"),
        ("a an the", ""),
        ("", ""),
        ("左肺 ; naïve", "左肺 naïve"),
        ("one\ntwo\u00a0three\u2028four", "1 2 3 4"),
    ],
)
def test_normalization(text, normal):
    assert normalize_answer(text) == normal


def test_only_32_periods_are_stripped():
    assert normalize_answer("a. " * 33) == "a."
    # exact match compares texts normalised once, the overlap texts normalised twice
    (row,) = score_answers([answer("x. " * 33, "x " * 33)]).rows
    assert not row.exact
    assert row.overlap == Overlap(1.0, 1.0, 1.0)


def test_overlap_counts_shared_words_as_often_as_the_prediction_says_them():
    # shared: opacity twice; alone in the prediction: left; alone in the truth: right, lower
    overlap = token_f1("opacity opacity left", "opacity right lower")
    assert overlap.precision == 2 / 3
    assert overlap.recall == 2 / 4
    assert overlap.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert token_f1("left", "right") == token_f1("", "right") == token_f1("left", "the") == Overlap(0, 0, 0)


@pytest.mark.parametrize(
    ("row", "hit", "exact"),
    [
        (answer("ASSISTANT: -left-right", "left right", "CLOSED"), True, True),
        (answer("not sure", "no", "CLOSED"), True, False),  # contained as letters, as published
        (
            answer("yes", "the", "CLOSED"),
            True,
            False,
        ),  # nothing is left of the truth, and nothing is in everything
        (answer("no", "yes", "CLOSED"), False, False),
        (answer("left lung", "left upper"), False, False),  # recall is one half, not more
        (answer("left lung", "left"), True, False),
        (answer(None, "none", "CLOSED"), True, True),
        (answer(12, "12.", "CLOSED"), True, True),
        (answer(["a", {"b": 1}], "x"), False, False),
        (answer("\ud83d half", "half"), True, False),
    ],
)
def test_hits(row, hit, exact):
    (score,) = score_answers([row]).rows
    assert (score.hit, score.exact) == (hit, exact)


def test_bleu_by_hand():
    # 4 words of 5: brevity exp(1 - 5/4); unigrams 4/4, bigrams 2/3, trigrams 1/2, four-grams 0/1
    scores = score_answers([answer("w x y v", "w x y z v")])
    brevity = 2.718281828459045 ** (1 - 5 / 4)
    assert scores.metrics["bleu_score_1"] == pytest.approx(100 * brevity)
    assert scores.metrics["bleu_score_2"] == pytest.approx(100 * brevity * 2 / 3)
    assert scores.metrics["bleu_score_3"] == pytest.approx(100 * brevity / 2)
    assert scores.metrics["bleu_score"] == pytest.approx(0, abs=1e-60)


def test_kinds_of_questions_have_metrics_of_their_own():
    opened, closed = answer("left", "left"), answer("no", "yes", "CLOSED")
    both = score_answers([opened, closed])
    assert (both.open, both.closed) == (1, 1)
    assert both.metrics["exact match score"] == 50
    assert both.metrics["f1 score"] == 100
    assert both.metrics["close accuracy"] == 0
    assert "close accuracy" not in score_answers([opened]).metrics
    assert list(score_answers([closed]).metrics) == ["exact match score", "close accuracy"]
    assert score_answers([]).metrics == {}


def test_nltk_does_not_warn_of_short_answers(recwarn):
    score_answers([answer("left", "left"), answer("right", "left")])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge_l", "recall"),
    [
        # 4 words against 6, the longest common subsequence has 4: P = 1, R = 4/6
        ("The heart is large.", "the heart is not very large", 0.8, 4 / 6),
        # the same words in another order: a common subsequence of 2 of 4, but every word recalled
        ("clear lungs normal heart", "normal heart clear lungs", 0.5, 1.0),
        # a word counts as often as both texts have it
        ("no no no", "no effusion", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2), 0.5),
        ("", "no effusion", 0.0, 0.0),
    ],
)
def test_rouge_l_and_token_recall_by_hand(prediction, reference, rouge_l, recall):
    assert report_overlap(prediction, reference)[:2] == pytest.approx((rouge_l, recall))


def test_added_metrics_are_of_one_kind_of_answers():
    scores = score_answers([answer("clear lungs", "clear lungs"), answer("yes", "no", "CLOSED")])
    assert scores.added == {"rouge-l": 100, "token recall": 100, "squad f1": 100, "whole-word accuracy": 0}
    assert score_answers([answer("yes", "no", "CLOSED")]).added == {"whole-word accuracy": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Left-lung, 3.5 cm_x", ["the", "left", "lung", "3", "5", "cm", "x"]),
        ("Pneumonie déjà vue", ["pneumonie", "déjà", "vue"]),
        ("de\u0301ja\u0300", ["déjà"]),  # accents as marks of their own
        ("легкое справа", ["легкое", "справа"]),
        ("左肺 T2", ["左", "肺", "t2"]),
        ("फेफड़े", ["फेफड़े"]),  # vowel signs are marks
        ("?  +", ["?", "+"]),
        (" ", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]
    (row,) = score_answers([answer(text, text)]).rows
    assert row.added == ((1.0, 1.0, 1.0) if expected else (0.0, 0.0, 0.0))


def test_squad_f1_counts_a_word_as_often_as_both_have_it():
    said, truth = "no no no no no effusion", "no effusion"
    assert token_f1(said, truth).f1 == 1.0  # as published
    assert report_overlap(said, truth)[2] == 2 * 2 / (6 + 2)


@pytest.mark.parametrize(
    ("said", "truth", "published", "whole"),
    [
        ("Yes, the bone is abnormal.", "no", True, False),
        ("abnormal", "normal", True, False),
        ("No, there is none.", "no", True, True),
        ("yes and no", "no", True, False),
        ("in the left lower lobe", "Left lower", True, True),
        ("B", "A", True, False),  # nothing is left of an article, and nothing is in everything
        ("(A)", "A", True, True),
        ("", "", True, False),
        ("", "A", True, False),
    ],
)
def test_closed_accuracy_by_whole_words(said, truth, published, whole):
    (row,) = score_answers([answer(said, truth, "CLOSED")]).rows
    assert (row.hit, row.said) == (published, whole)


def test_corpus_bleu_is_nltks():
    lines = (GOLDEN / "open.answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = score_answers(SimpleNamespace(**json.loads(line)) for line in lines).rows
    rows = [row for row in rows if len(row.prediction.split()) >= 4]  # NLTK counts a 4-gram in shorter ones, too
    counts = np.array([row.ngrams for row in rows], dtype=float).sum(axis=0, keepdims=True)
    theirs = nltk_corpus_bleu([[row.reference.split()] for row in rows], [row.prediction.split() for row in rows])
    assert corpus_bleu(counts)[0] == pytest.approx(theirs)
    assert corpus_bleu(np.array([ngram_counts("left", "left")], dtype=float))[0] == 0  # no 4-gram
    assert ngram_counts("a b b", "b b c") == (2, 1, 0, 0, 3, 2, 1, 0, 3, 3)
