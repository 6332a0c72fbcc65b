"""Numbers as words of a closed answer."""

from typing import NamedTuple

import pytest

from mslora_cr.metrics.closed import class_of
from mslora_cr.metrics.numbers import number_in
from mslora_cr.metrics.options import parse_choice
from mslora_cr.metrics.published import score_answers
from mslora_cr.metrics.words import number_words


class Row(NamedTuple):
    text: str
    gt: str
    answer_type: str = "CLOSED"


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("3.5 cm", "5", False),
        ("1.5 cm", "1", False),
        ("0.25", "25", False),
        ("2.5 cm", "2.5 cm", True),
        ("it is 2.5 cm wide", "2.5 cm", True),
        ("-5", "5", False),
        ("-5 degrees", "-5", True),
        ("1,000 cells", "1000", True),
        ("1,000", "1", False),
        ("2,5", "2.5", True),
        ("3.0", "3", True),
        ("3", "3,0", True),
        (".5", "5", False),
        (".5", "0,50", True),
        ("2.5cm", "2", False),
        ("2.5cm", "2.5 cm", True),
        ("five", "5", True),
        ("T2-weighted", "t2", True),
        ("5.", "5", True),
        ("<think>no, or yes</think>yes", "yes", True),
    ],
)
def test_a_number_is_one_word(text: str, truth: str, right: bool) -> None:
    [row] = score_answers([Row(text, truth)]).rows
    assert row.said is right


def test_numbers_as_words() -> None:
    assert (
        number_words("from 3-5 to -0.5, 1,234.5 and 5 of T1.5") == "from 3-5 to minus0point5, 1234point5 and 5 of T1.5"
    )


def test_classes_counts_and_options_read_numbers_alike() -> None:
    assert [class_of(text, {}) for text in ("-5", "1,5 cm", "15 cm", "3.0", "on 1.2.2020")] == [
        *("-5", "1.5 cm", "15 cm", "3", "on 1.2.2020")
    ]
    texts = ("2,5 cells", "1,000", ".5", "\u22124", "L-5", "1.2.2020 and 7")
    assert [number_in(text) for text in texts] == [2.5, 1000, 0.5, -4, 5, 7]
    options = {"A": "5 mm", "B": "0.5 mm"}
    assert [parse_choice(text, options).letter for text in ("3.5 mm", ".5 mm", "5.0 mm")] == [None, "B", "A"]
