r"""The final part of an answer that reasons: behind `<think>…</think>`, in `<answer>…</answer>`, in `\boxed{…}`.

A final part is found by this rule, also in a truth that is written with its reasoning:

1. A thought is left out. It ends at the last closing mark (`</think>`; Kimi-VL: `◁/think▷`; MedGemma: `<unused95>`);
   its opening mark may be missing, because chat templates write it themselves. A thought that is opened and never
   closed goes to the end of the text.
2. Of the rest, the last complete `<answer>…</answer>` counts; without one, what follows the last `<answer>`.
3. Of that, the last complete `\boxed{…}` counts, or `<|begin_of_box|>…<|end_of_box|>` of GLM-4.1V, braces balanced and
   `\text{…}` around the whole taken off; without one, what follows the last one that is open.
4. If nothing stands behind a closed thought, rules 2 and 3 look into the thought, where a final answer must be marked.

Every other text is its own final part.
"""

from __future__ import annotations

import re
from typing import NamedTuple

OPENINGS = ("<think>", "◁think▷", "<unused94>")
CLOSINGS = ("</think>", "◁/think▷", "<unused95>")
MARKS = (*OPENINGS, *CLOSINGS, "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")
"""Tokens that a tokenizer may call special, and that are a part of an answer all the same."""


def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, marks)), re.IGNORECASE)


_REASONS = re.compile(r"\\boxed|" + _any_of(MARKS).pattern, re.IGNORECASE)
_OPENING, _CLOSING = _any_of(OPENINGS), _any_of(CLOSINGS)
_ANSWER = re.compile(r"<answer>|</answer>", re.IGNORECASE)
_GLM_BOX = re.compile(r"<\|begin_of_box\|>|<\|end_of_box\|>")
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


class FinalAnswer(NamedTuple):
    """The final part of an answer.

    Attributes:
        text: The final part; outer white space is removed where it is not the whole answer.
        reasoned: Whether the answer has marks of reasoning, so that only a part of it is final.
        truncated: Whether the answer ends within a thought or a marked answer.
    """

    text: str
    reasoned: bool = False
    truncated: bool = False


def final_answer(text: str) -> FinalAnswer:
    """Return the part of an answer that is scored, by the module's rule; takes time in proportion to the text."""
    if not _REASONS.search(text):
        return FinalAnswer(text)
    thought, rest = _parted(text)
    opened = _OPENING.search(rest)
    if opened:
        rest = rest[: opened.start()]
    final, cut = _marked(rest)
    if not final and not opened:
        inside, cut_inside = _marked(thought)
        if inside != thought.strip():
            final, cut = inside, cut_inside
    return FinalAnswer(final, True, cut or opened is not None)


def _parted(text: str) -> tuple[str, str]:
    """Return what stands before the last end of a thought, and behind it."""
    ends = [match.span() for match in _CLOSING.finditer(text)]
    return (text[: ends[-1][0]], text[ends[-1][1] :]) if ends else ("", text)


def _marked(text: str) -> tuple[str, bool]:
    """Return the part of a text that is marked as the answer, and whether its end is missing; the whole without a
    mark."""
    answer, cut = _last_block(text, _ANSWER)
    boxed, box_cut = _last_block(answer, _GLM_BOX)
    if boxed == answer:
        boxed, box_cut = _last_box(answer)
    whole = _WRAPPED.fullmatch(boxed.strip())
    return (whole[1] if whole else boxed).strip(), cut or box_cut


def _last_block(text: str, marks: re.Pattern[str]) -> tuple[str, bool]:
    """Return what is between the last two marks that belong together; without such a pair, behind the last
    opening.
    """
    complete, opened = None, None
    for mark in marks.finditer(text):
        if mark[0][1] != "/" and "end" not in mark[0]:
            opened = mark.end()
        elif opened is not None:
            complete, opened = text[opened : mark.start()], None
    if complete is not None:
        return complete, False
    return (text, False) if opened is None else (text[opened:], True)


def _last_box(text: str) -> tuple[str, bool]:
    r"""Do as `_last_block`, between the balanced braces of the `\boxed{…}` that is opened last."""
    open_braces: list[int | None] = []
    complete, start = "", -1
    for brace in _BRACE.finditer(text):
        if brace[0].startswith("\\boxed"):
            open_braces.append(brace.end())
        elif brace[0] == "{":
            open_braces.append(None)
        elif brace[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None and opened > start:
                complete, start = text[opened : brace.start()], opened
    if start >= 0:
        return complete, False
    opened_last = next((position for position in reversed(open_braces) if position is not None), None)
    return (text, False) if opened_last is None else (text[opened_last:], True)
