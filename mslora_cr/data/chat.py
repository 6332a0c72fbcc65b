"""Conversations → text, by a processor's own chat template, and where in it the answers are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError

from mslora_cr.data.prompts import Turn
from mslora_cr.data.records import IMAGE

Message = dict[str, Any]
Span = tuple[int, int]
"""First character, and the one behind the last."""


class Chat(NamedTuple):
    """A conversation as its template has it; each image is still one placeholder."""

    text: str
    answers: tuple[Span, ...]
    """Mark the trained tokens: each answer up to and including the token that ends it."""


def messages_of(turns: Sequence[Turn], images: int) -> list[Message]:
    """Turns as transformers' chat templates take them, a turn's images in front of its text.

    Each turn has the images that it marks with `<image>`; where the marks are not as many as the images, the first
    question has them all. What an assistant says before the first question is dropped, as for LLaVA-Med.
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


DATE = datetime(2024, 7, 26)
"""What a template is given that asks for today's date: a bank is asked with the prompts that it was trained with."""
_DIRECTIVES = "aAbBdHIjmMpSuUwyYZ"


def dated(template: str) -> str:
    """A chat template whose `strftime_now`, if it has one, writes `DATE` on every day, in exports too."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('%{name}', '{DATE.strftime(f'%{name}')}')" for name in _DIRECTIVES)
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}{template}"


def render(processor: Any, messages: Sequence[Message], to_answer: bool = False) -> str:
    """The text of some messages; `to_answer`: up to where the assistant's next answer begins.

    Raises:
        ValueError: the template has no place for them.
    """
    try:
        text: str = processor.apply_chat_template(list(messages), add_generation_prompt=to_answer, tokenize=False)
    except TemplateError as error:  # templates raise it to refuse roles in another order
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from None
    return text


def training_chat(processor: Any, messages: Sequence[Message], ends: Collection[str], eos: str) -> Chat:
    """A whole conversation and its answers.

    An answer begins where the template would let the assistant begin, so that what is learned is what is generated. If
    a template ends the last answer by no token, as LLaVA-1.5's, `eos` stands behind it: its end must be learned, too.

    Args:
        ends: tokens that end an answer when they are generated.

    Raises:
        ValueError: the template refuses the messages, or rewrites earlier ones once later ones follow.
    """
    text, answers = render(processor, messages), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(processor, messages[:index], to_answer=True)
        through = render(processor, messages[: index + 1])
        if not text.startswith(through) or not through.startswith(before):
            raise ValueError("the model's chat template writes an answer otherwise once the conversation goes on")
        start, stop = len(before), len(through)
        stops = [text.rfind(end, start, stop) + len(end) for end in ends if text.rfind(end, start, stop) >= 0]
        answers.append((start, max(stops, default=stop)))
        if not stops and index == len(messages) - 1:
            text += eos
            answers[-1] = (start, len(text))
    return Chat(text, tuple(answers))
