"""Turns conversations into text with a processor's own chat template, and locates the answers in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError

from mslora_cr.data.prompts import Turn
from mslora_cr.data.records import IMAGE

Message = dict[str, Any]
Span = tuple[int, int]
"""The first character, and the one after the last."""


class Chat(NamedTuple):
    """A conversation as its template writes it; each image is still one placeholder."""

    text: str
    answers: tuple[Span, ...]
    """Mark the trained tokens: each answer up to and including the token that ends it."""


def messages_of(turns: Sequence[Turn], images: int) -> list[Message]:
    """Return turns as transformers' chat templates take them, with a turn's images before its text.

    Each turn has the images that it marks with `<image>`; if the number of marks differs from that of the images, the
    first question has all images. What an assistant says before the first question is dropped, as for LLaVA-Med.
    """
    turns = turns[1:] if turns and turns[0].speaker != "human" else turns
    marks = [turn.text.count(IMAGE) for turn in turns]
    if sum(marks) != images:
        marks = [images if index == 0 else 0 for index in range(len(turns))]
    return [
        {
            "role": "user" if turn.speaker == "human" else "assistant",
            "content": [{"type": "image"}] * count + [{"type": "text", "text": turn.text.replace(IMAGE, "").strip()}],
        }
        for turn, count in zip(turns, marks, strict=True)
    ]


REWRITES = "the model's chat template changes an answer once the conversation continues"
DROPS = "the model's chat template leaves out or changes an answer"
DATE = datetime(2024, 7, 26)
"""The date for templates that ask for today's: a bank is asked with the prompts that it was trained with."""
_DIRECTIVES = "aAbBdHIjmMpSuUwyYZ"


def asks_for_date(template: str) -> bool:
    """Return whether a chat template writes today's date, unless it is `dated`."""
    return "strftime_now" in template


def dated(template: str) -> str:
    """Return a chat template whose `strftime_now`, if it has one, always writes `DATE`, in exports too."""
    if not asks_for_date(template):
        return template
    filters = "".join(f"|replace('%{name}', '{DATE.strftime(f'%{name}')}')" for name in _DIRECTIVES)
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}{template}"


def render(processor: Any, messages: Sequence[Message], to_answer: bool = False) -> str:
    """Return the text of some messages; with `to_answer`, up to the start of the assistant's next answer.

    Raises:
        ValueError: There are none, or the template does not accept them.
    """
    if not messages:
        raise ValueError("the conversation has no question")
    try:
        text: str = processor.apply_chat_template(list(messages), add_generation_prompt=to_answer, tokenize=False)
    except TemplateError as error:  # Templates raise it to refuse roles in another order.
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from None
    return text


def training_chat(processor: Any, messages: Sequence[Message], ends: Collection[str], eos: str) -> Chat:
    """Return a whole conversation and its answers.

    An answer begins where the template would let the assistant begin, so that what is learned is what is generated. If
    a template ends the last answer by no token, as LLaVA-1.5's, `eos` stands behind it: its end must be learned, too.

    A template may strip or add thoughts. The last answer then has its own, as the record gives it (`_as_generated`). An
    earlier answer without a thought is learned where the template writes it, also without the thought that its prompt
    opens; one whose thought the template drops is context alone.

    Args:
        ends: Tokens that end an answer when they are generated.

    Raises:
        ValueError: The template refuses the messages, does not write an answer as it is, or rewrites earlier messages
            once later ones follow.
    """
    rounds = [
        _Round(processor, messages, index) for index, message in enumerate(messages) if message["role"] == "assistant"
    ]
    answered_last = rounds and rounds[-1].index == len(messages) - 1
    text, answers = rounds[-1].written if answered_last else render(processor, messages), []
    for answer in rounds:
        if (span := answer.span_in(text)) is None:
            continue
        start, stop = span
        stops = [text.rfind(end, start, stop) + len(end) for end in ends if text.rfind(end, start, stop) >= 0]
        answers.append((start, max(stops, default=stop)))
        if not stops and answer.index == len(messages) - 1:
            text += eos
            answers[-1] = (start, len(text))
    return Chat(text, tuple(answers))


class _Round:
    """An answer of a conversation, and the template's text of the conversation up to it.

    Attributes:
        index: The index of the answer's message.
        before: The prompt from which the model would answer.
        written: `before`, the answer, and what ends it.
    """

    def __init__(self, processor: Any, messages: Sequence[Message], index: int) -> None:
        self.index = index
        self.said: str = messages[index]["content"][-1]["text"]
        self.before = render(processor, messages[:index], to_answer=True)
        self.written = _as_generated(self.before, render(processor, messages[: index + 1]), self.said)

    def span_in(self, text: str) -> Span | None:
        """Return where the answer and what ends it are in the whole conversation; None without its thought."""
        if text.startswith(self.written):
            return len(self.before), len(self.written)
        if not _THOUGHT.match(self.said):
            for before in (self.before, _PROMPTED.sub("", self.before)):
                if text.startswith(before + self.said):
                    return len(before), len(before) + len(self.said) + len(_tail(self.written, self.said))
        if _apart_from_thoughts(text).startswith(_apart_from_thoughts(self.written)):
            return None
        raise ValueError(REWRITES)


_THOUGHT = re.compile(r"(?:<think>)?(?P<thought>.*?)</think>\s*", re.DOTALL)
_PROMPTED = re.compile(r"<think>\s*(?P<closed></think>\s*)?\Z")
"""A thought that a template opens for the model, closed because the model is not to think."""


def _as_generated(before: str, written: str, said: str) -> str:
    """Return a conversation as it would come about: the prompt, the answer with its thought, and what ends the answer.

    Most templates write that. Of one that strips the thought, or writes it elsewhere than its prompt opens one, the
    prompt and what follows the answer are taken; between them stands the answer as the record gives it.

    Args:
        written: The conversation with the answer, as the template writes it.
    """
    thought = _THOUGHT.match(said)
    final = said[thought.end() :] if thought else said
    if _letters(final) not in _letters(written.removeprefix(before)):
        raise ValueError(DROPS)
    if written.startswith(before) and (thought is None or thought["thought"].strip() in written[len(before) :]):
        return written
    prompted = _PROMPTED.search(before)
    header = before[: prompted.start()] if prompted else before
    if (thought is None and prompted is None) or not written.startswith(header) or final.strip() not in written:
        raise ValueError(REWRITES)
    if prompted is None or prompted["closed"]:
        answer = said
    elif thought is None:
        answer = f"\n</think>\n\n{said}"
    else:
        answer = said.removeprefix("<think>").lstrip()
    return before + answer + _tail(written, final.strip())


def _tail(written: str, said: str) -> str:
    """Return what a template writes after an answer."""
    return written[written.rindex(said) + len(said) :]


def _apart_from_thoughts(text: str) -> str:
    return _letters(re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL))


def _letters(text: str) -> str:
    return "".join(text.split())


def aligned(text: Sequence[int], ids: Sequence[int], image: int | None) -> Iterator[tuple[int, int]]:
    """Find a text's tokens once its images' placeholders are replaced, as (position in text, position in ids).

    The parts between placeholders keep their ids and order: the first part starts `ids`, the last one ends it, and each
    part between is searched for after the one before. Nothing is yielded from the first part that is not found.
    """
    ends = [start_of_part for start_of_part, token in enumerate(text) if token == image]
    starts, behind = [0, *(start_of_part + 1 for start_of_part in ends)], 0
    for start, stop in zip(starts, [*ends, len(text)], strict=True):
        part = list(text[start:stop])
        ending = stop == len(text)
        start_of_part = len(ids) - len(part) if ending else _index_of(ids, part, behind) if start else 0
        whole = start > 0 or not ending or len(part) == len(ids)
        if not whole or start_of_part < behind or list(ids[start_of_part : start_of_part + len(part)]) != part:
            return
        yield from zip(range(start, stop), range(start_of_part, start_of_part + len(part)), strict=True)
        behind = start_of_part + len(part)


def _index_of(ids: Sequence[int], part: list[int], behind: int) -> int:
    """Return the first place of a part, -1 without any."""
    return next((start for start in range(behind, len(ids)) if list(ids[start : start + len(part)]) == part), -1)
