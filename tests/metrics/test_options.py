"""Letters, letters with text, and text, as models answer questions with options."""

import pytest

from mslora_cr.data.answers.options import letter_of, lettered, rotated, with_options
from mslora_cr.metrics.options import Choice, counts_of, parse_choice

OPTIONS = {"A": "lung", "B": "left lung", "C": "a heart"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. left lung", "B"),
        ("B: left lung", "B"),
        ("Left lung.", "B"),
        ("The answer is B", "B"),
        ("Answer: (C)", "C"),
        ("The correct option is C.", "C"),
        ("It shows the left lung", "B"),
        ("a heart", "C"),
        ("A heart is seen", "C"),
        ("It is (A), without doubt", "A"),
    ],
)
def test_one_option_is_chosen(answer: str, letter: str) -> None:
    assert parse_choice(answer, OPTIONS) == Choice("parsed", letter)


@pytest.mark.parametrize("answer", ["A. or B.", "(A) and (C)", "lung, or perhaps a heart"])
def test_several_are_ambiguous(answer: str) -> None:
    assert parse_choice(answer, OPTIONS).status == "ambiguous"


@pytest.mark.parametrize("answer", ["", "a liver", "I do not know", "D", "lungs"])
def test_none_is_unparsed(answer: str) -> None:
    assert parse_choice(answer, OPTIONS) == Choice("unparsed")


def test_truths_rotations_and_counts() -> None:
    assert rotated(OPTIONS, 1) == {"A": "a heart", "B": "lung", "C": "left lung"}
    assert rotated(rotated(OPTIONS, 1), 2) == OPTIONS
    assert (
        letter_of("Left lung", OPTIONS) == "B"
        and letter_of("(c)", OPTIONS) == "C"
        and letter_of("liver", OPTIONS) is None
    )
    choices = [parse_choice(answer, OPTIONS) for answer in ("A", "A. or B.", "", "C")]
    assert counts_of(choices) == {"parsed": 2, "unparsed": 1, "ambiguous": 1}
    assert with_options("What?", {}) == "What?" and lettered({"a": "x", "B": "y"}) == {"A": "x", "B": "y"}
