"""The final part of an answer that reasons."""

import pytest

from mslora_cr.data.answers.reasoning import thinks, without_thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>It may be normal.</think>\n\ntumor", "tumor"),
        ("It may be normal.</think> tumor", "tumor"),
        (" <THINK>\nnormal\n</think>tumor", "tumor"),
        ("<think>It may be tumor, it", ""),
        ("tumor", "tumor"),
        ("I think> so", "I think> so"),
        ("<thinking", "<thinking"),
    ],
)
def test_what_stands_before_an_answer(text: str, answer: str) -> None:
    assert without_thinking(text) == answer
    assert thinks(text) == (text != answer)
