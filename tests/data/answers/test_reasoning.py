"""The final part of an answer that reasons."""

import time

import pytest

from mslora_cr.data.answers.reasoning import final_answer


@pytest.mark.parametrize(
    ("text", "final", "truncated"),
    [
        ("<think>It may be normal.</think>\n\ntumor", "tumor", False),
        ("It may be normal.</think> tumor", "tumor", False),  # the template opened the thought
        (" <THINK>\nnormal\n</think>tumor", "tumor", False),
        ("<think>a</think>b<think>c</think>d", "d", False),
        ("<think>It may be tumor, it", "", True),
        ("<think>a</think>tumor <think>or", "tumor", True),
        ("<think>no</think><answer> B </answer>", "B", False),
        ("<answer>A</answer>, no: <answer>B</answer> it is", "B", False),
        ("It shows a mass. <answer>malig", "malig", True),
        ("<think>A?</think> So it is $\\boxed{\\text{B}}$.", "B", False),
        ("\\boxed{A} or rather \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}", False),
        ("<answer>It is \\boxed{\\{1, 2\\}}.</answer>", "\\{1, 2\\}", False),
        ("hence \\boxed{\\text{yes", "\\text{yes", True),
        ("<think>x</think><answer><|begin_of_box|>C<|end_of_box|></answer>", "C", False),
        ("◁think▷no◁/think▷yes", "yes", False),
        ("<unused94>thought\nno<unused95>yes", "yes", False),
        ("<think>It is \\boxed{7}.</think>", "7", False),
        ("<think>It is 7.</think>", "", False),
        ("<think>It is \\boxed{7}, let me", "", True),
    ],
)
def test_the_final_part(text: str, final: str, truncated: bool) -> None:
    assert final_answer(text) == (final, True, truncated)


@pytest.mark.parametrize("text", [" tumor ", "I think> so", "<thinking", "an answer {1}", "box{A}", ""])
def test_a_text_without_marks_is_its_own_final_part(text: str) -> None:
    assert final_answer(text) == (text, False, False)


@pytest.mark.parametrize("part", ["<think>", "</think>", "<answer>", "\\boxed{", "{", "\\boxed{}", "◁think▷"])
def test_long_nonsense_takes_no_time(part: str) -> None:
    started = time.perf_counter()
    final_answer("\\boxed{" + part * 50_000)
    assert time.perf_counter() - started < 2
