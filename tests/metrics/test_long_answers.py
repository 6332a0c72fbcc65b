"""Answers that are too long to be answers are scored in bounded memory, and with the numbers of the library."""

import time
import tracemalloc
from dataclasses import dataclass
from random import Random
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from mslora_cr.metrics.published import score_answers
from mslora_cr.metrics.words import lcs_length, report_overlap, words

WORDS = st.lists(st.sampled_from(["a", "b", "cell", "the", "no", "Yes.", "T2-weighted", "é", "..."]), max_size=25)


class OurWords(Tokenizer):
    """The library's own drop what is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(WORDS, WORDS)
def test_the_numbers_are_the_librarys(said: list[str], expected: list[str]) -> None:
    prediction, reference = " ".join(said), " ".join(expected)
    theirs = RougeScorer(["rouge1", "rougeL"], tokenizer=OurWords()).score(reference, prediction)
    assert report_overlap(prediction, reference)[:2] == (theirs["rougeL"].fmeasure, theirs["rouge1"].recall)


def test_by_hand() -> None:
    assert lcs_length(["a", "b", "c", "d", "b", "a"], ["b", "d", "c", "a", "b", "a"]) == 4  # b c b a, or b d b a
    assert lcs_length([], ["a"]) == lcs_length(["a"], []) == lcs_length(["a"], ["b"]) == 0


@dataclass
class Row:
    text: str
    gt: str
    answer_type: Literal["OPEN", "CLOSED"] = "OPEN"


def test_twenty_thousand_words_cost_little() -> None:
    random = Random(0)
    one, other = (" ".join(f"w{random.randrange(500)}" for _ in range(20_000)) for _ in range(2))
    tracemalloc.start()
    start = time.process_time()
    scores = score_answers([Row(one, other), Row(one, "no", "CLOSED")])
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < scores.added["rouge-l"] < 100
    assert peak < 100 << 20 and seconds < 20
