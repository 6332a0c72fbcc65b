"""The output of `mslora-cr ask`, and its conversation on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mslora_cr.data.records import DataError

if TYPE_CHECKING:
    from mslora_cr.serving.answering import Answer, AnsweringModel, Exchange

HELP = """Each question sees those before it and their answers. Lines that begin with a slash are commands:
  /image FILE [FILE …]   look at other pictures; the conversation begins anew
  /new                   begin anew with the same pictures
  /quit                  end, as does Ctrl-D"""


def converse(
    model: AnsweringModel, images: Sequence[str], lines: Iterable[str], max_new_tokens: int | None = None
) -> None:
    """Answer line after line, each with the earlier ones as context; answers go to standard output.

    If no task is given, the first question routes the whole conversation: a later one ("And the left?") says little by
    itself.
    """
    history: list[Exchange] = []
    seen: Sequence[Any] = list(images)
    aside(HELP)
    aside(f"pictures: {', '.join(map(str, seen)) or 'none yet'}\n> ", end="")
    for line in lines:
        words = line.split()
        if words[:1] == ["/quit"]:
            break
        if words[:1] == ["/image"] and words[1:]:
            try:
                seen, history = _pictures(words[1:]), []
            except DataError as error:
                aside(f"error: {error}; the pictures stay")
        elif words == ["/new"]:
            history = []
        elif words and words[0].startswith("/"):
            aside(HELP)
        elif words:
            try:
                answer = model.ask(seen, line.strip(), history=history, max_new_tokens=max_new_tokens, on_text=write)
                print(flush=True)
                if not history:
                    aside(f"# {answered_by(answer)}")
                history.append((line.strip(), answer.text))
            except DataError as error:  # A mistyped file name must not end the conversation.
                aside(f"error: {error}")
        aside("> ", end="")
    aside("")


def _pictures(names: Sequence[str]) -> list[Any]:
    from mslora_cr.serving.answering import open_image

    if missing := [name for name in names if not Path(name).is_file()]:
        raise DataError(f"{missing[0]}: there is no such image file")
    return [open_image(name) for name in names]


def answered_by(answer: Answer) -> str:
    """Return one line: the banks that answered, and the router's probabilities."""
    sure = "" if answer.confidence is None else f"; probability of the answer {answer.confidence:.1%}"
    banks = f"banks {'+'.join(answer.banks)}" if answer.banks else "the base model, no bank"
    if answer.foreign:
        sure += "; the question is like none of the tasks"
    if not answer.probabilities:
        return f"{banks}{sure}"
    likely = ", ".join(f"{task} {share:.1%}" for task, share in list(answer.probabilities.items())[:3])
    return f"predicted task {answer.task}: {likely}; {banks}{sure}"


def write(text: str) -> None:
    print(text, end="", flush=True)


def aside(text: str, end: str = "\n") -> None:
    print(text, file=sys.stderr, end=end, flush=True)
