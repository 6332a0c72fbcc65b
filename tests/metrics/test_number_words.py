"""Numbers as words of a closed answer."""

from typing import NamedTuple

import pytest

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
